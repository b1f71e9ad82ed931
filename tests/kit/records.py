"""Compressed weights of random values: blocks of integers, and look-up tables."""

import numpy as np
import torch

from mptrain.compress.weights.records import BlockQuantized, Palettized


def quantized(rows, columns, *, bits=4, scales=(1, 1), signed=True, zero=False, half=True, seed=0):
    rng = np.random.default_rng(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = np.int8 if signed else np.uint8
    scale = rng.normal(size=scales).astype(np.float16 if half else np.float32).astype(np.float32)
    return BlockQuantized(
        torch.from_numpy(rng.integers(low, high, (rows, columns)).astype(dtype)),
        torch.from_numpy(scale),
        torch.from_numpy(rng.integers(low, high, scales).astype(dtype)) if zero else None,
        bits,
    )


def palettized(rows, columns, *, bits=3, per_group=4, dim=1, scaled=False, seed=0):
    rng = np.random.default_rng(seed)
    lut = rng.normal(size=(-(-rows // per_group), 2**bits, dim)).astype(np.float16).astype(np.float32)
    return Palettized(
        torch.from_numpy(rng.integers(0, 2**bits, (rows, columns // dim)).astype(np.uint8)),
        torch.from_numpy(lut),
        per_group,
        torch.from_numpy(rng.random((rows, 1), dtype=np.float32)) if scaled else None,
        bits,
    )
