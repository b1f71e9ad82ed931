"""Compressed constants of a MIL program as the numbers they stand for: blocks of integers, tables, sparse values.

Semantics are those of coremltools' `converters.mil.mil.ops.defs`, iOS 15 to 18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Operation = Callable[..., Any]


def spread(parameter: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the values of blocks so that they fit `shape`."""
    for axis, (blocks, size) in enumerate(zip(parameter.shape, shape)):
        if blocks not in (1, size):
            parameter = parameter.repeat_interleave(size // blocks, axis)
    return parameter


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), a scale and an offset to each block."""
    shifted = data.float() if offset is None else data.float() - spread(offset, data.shape)
    return shifted * spread(scale, data.shape)


def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    shape = [-1 if i == int(axis) % quantized_data.dim() else 1 for i in range(quantized_data.dim())]
    return (quantized_data.float() - zero_point.float().reshape(shape if zero_point.dim() else [])) * scale.reshape(
        shape if scale.dim() else []
    )


def lut_to_dense(indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Any = None) -> Tensor:
    """lut: [groups along each axis of indices…, entries, vector]; before iOS 18 [entries], and packed indices."""
    if shape is not None:
        bits = int(np.log2(lut.numel()))
        stream = np.unpackbits(indices.numpy().astype(np.uint8), bitorder="little")
        count = int(shape.prod())
        numbers = stream[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))
        return lut[torch.from_numpy(numbers.astype(np.int64))].reshape(shape.tolist())
    rank = indices.dim()
    index = []
    for axis in range(rank):
        group = torch.arange(indices.shape[axis]) // (indices.shape[axis] // lut.shape[axis])
        index.append(group.reshape([-1 if i == axis else 1 for i in range(rank)]))
    found = lut[(*index, indices)]  # [*indices.shape, vector]
    if lut.shape[-1] == 1:
        return found.squeeze(-1)
    axis = int(vector_axis) % rank
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    if shape is not None:
        bits = np.unpackbits(mask.numpy().astype(np.uint8), bitorder="little")[: int(shape.prod())]
        mask = torch.from_numpy(bits.astype(np.bool_)).reshape(shape.tolist())
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: Any = None
) -> tuple[Tensor, Tensor]:
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = indices_mask.bool()
    if lut.shape[-1] > 1:
        mask = mask.repeat_interleave(lut.shape[-1], int(vector_axis))
    return mask, dense[mask]


def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask.bool(), dense[data_mask.bool()]


CONSTANTS: dict[str, Operation] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": lambda source_val, output_dtype: source_val,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
