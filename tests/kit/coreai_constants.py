"""Reads the integers and tables of a saved Core AI asset back, bit by bit."""

import re
from pathlib import Path

import numpy as np
from coreai.authoring.asset import AIModelAsset

_CONSTANT = re.compile(r"coreai\.constant (?:dense_resource<(\w+)>|dense<(.*?)>) : tensor<([\dx]*)([a-z]+\d+)>")
_FLOATS = {"f32": np.float32, "f16": np.float16}


def constants(asset: Path) -> list[tuple[str, np.ndarray]]:
    """(element type, values) of every constant that is stored as a blob: weights, not shapes and scalars."""
    text = str(AIModelAsset.load(asset).program)
    blobs = {name: bytes.fromhex(data)[4:] for name, data in re.findall(r'(resource_\w+): "0x([0-9A-F]+)"', text)}
    found = []
    for resource, _, sizes, kind in _CONSTANT.findall(text):
        if resource:
            shape = [int(size) for size in sizes.split("x") if size]
            found.append((kind, _values(blobs[resource], kind, shape)))
    return found


def _values(blob: bytes, kind: str, shape: list[int]) -> np.ndarray:
    if kind in _FLOATS:
        return np.frombuffer(blob, _FLOATS[kind]).reshape(shape)
    bits, count = int(re.search(r"\d+", kind)[0]), int(np.prod(shape))
    stream = np.unpackbits(np.frombuffer(blob, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    values = (stream.astype(np.int64) << np.arange(bits)).sum(1)
    if kind.startswith("s"):
        values -= (values >> (bits - 1)) << bits
    return values.reshape(shape)
