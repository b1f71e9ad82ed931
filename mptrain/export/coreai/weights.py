"""Compressed weights as Core AI constants: the same integers and tables, never computed again.

    Palettized        lut_to_dense(indices uN, lut [groups, 1, 2^N, cluster_dim]), then its scale per row
    BlockQuantized    blockwise_shift_scale(q iN or uN, scale [rows | 1, blocks | 1], zero)

While a model is traced, each weight with a record is computed by one of coreai-torch's custom operations,
which its converter turns into the operation of that name on constants of N bits. Private, and held by the tests:
coreai-torch finds tables and indices by the names of the buffers, `lut` and `indices`, the bits of integers
by the operation's `input_dtype`, and packed bits in a tensor's attribute `elem`; it packs all widths but 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import coreai_torch._compression.custom_layers  # noqa: F401 - registers the operations
import coreai_torch._compression.utils as compression
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mptrain.compress.weights.records import BlockQuantized, Palettized, Record
from mptrain.core.patch import replaced

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
INTEGER_BITS = (2, 4, 8)
"""widths that Core AI stores; a record of other bits takes the next wider one, with the same values"""


def stored_bits(record: Record) -> int:
    """Bits of an integer or index of the record in an asset."""
    widths = PALETTE_BITS if isinstance(record, Palettized) else INTEGER_BITS
    return next(width for width in widths if width >= record.bits)


@contextmanager
def stored(model: nn.Module, records: Mapping[str, Record]) -> Iterator[None]:
    """Inside, the named weights are computed from their records; afterwards the model is as before.

    A record under two names, of a tied weight, is stored once.
    """
    sources: dict[int, nn.Module] = {}
    dense: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, record in records.items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            weight = getattr(module, attribute)
            if id(record) not in sources:
                sources[id(record)] = _source(record, weight.shape)
            parametrize.register_parametrization(module, attribute, sources[id(record)], unsafe=True)
            dense.append((module, attribute, weight))
            held = module.get_submodule(f"parametrizations.{attribute}")
            held.original = nn.Parameter(torch.empty(0), requires_grad=False)
        yield
    finally:
        for module, attribute, weight in dense:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            module._parameters[attribute] = weight


def _source(record: Record, shape: torch.Size) -> nn.Module:
    if isinstance(record, Palettized):
        return _Table(record, shape).eval()
    return _Blocks(record, shape).eval()


class _Table(nn.Module):
    def __init__(self, record: Palettized, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.transposed = shape, record.transposed
        self.register_buffer("indices", record.indices)
        self.register_buffer("lut", _tables(record))
        self.register_buffer("scale", record.per_channel_scale)

    def forward(self, _: Tensor) -> Tensor:
        weight = torch.ops.coreai.lut_to_dense(self.indices, self.lut, 1)
        if self.scale is not None:
            weight = torch.ops.coreai.constexpr_blockwise_shift_scale(weight, self.scale, None, None, None, None)
        return _as_held(weight, self.shape, self.transposed)


class _Blocks(nn.Module):
    def __init__(self, record: BlockQuantized, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.transposed = shape, record.transposed
        self.register_buffer("quantized_data", record.q)
        self.register_buffer("scale", record.scale)
        self.register_buffer("zero_point", record.zero)
        sign = "" if record.q.dtype.is_signed else "u"
        self.integer = getattr(torch, f"{sign}int{stored_bits(record)}")

    def forward(self, _: Tensor) -> Tensor:
        weight = torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.quantized_data, self.scale, self.zero_point, None, self.integer, None
        )
        return _as_held(weight, self.shape, self.transposed)


def _as_held(weight: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """A weight [out, in] as its parameter holds it."""
    if transposed:
        return weight.T
    return weight if weight.shape == shape else weight.reshape(shape)


def _tables(record: Palettized) -> Tensor:
    """[groups, 1, 2^stored bits, cluster_dim]: groups divide the rows evenly, entries that no index names are 0.

    Groups of rows are equal in Core AI; where the last one of the record is smaller, tables are repeated.
    """
    rows, size = record.indices.shape[0], record.rows_per_group
    repeats = 1 if record.lut.shape[0] == 1 else size // math.gcd(rows, size)
    lut = record.lut.repeat_interleave(repeats, 0)[: max(1, rows * repeats // size)]
    unused = 2 ** stored_bits(record) - lut.shape[1]
    return nn.functional.pad(lut, (0, 0, 0, unused))[:, None]


@contextmanager
def packing() -> Iterator[None]:
    """Inside, coreai-torch packs indices of 3 bits too."""
    known = compression.UintxTensor

    class AnyWidth:
        @staticmethod
        def from_unpacked(values: Tensor, bits: int) -> Tensor:
            return _three_bits(values) if bits == 3 else known.from_unpacked(values, bits)

    with replaced(compression, UintxTensor=AnyWidth):
        yield


def _three_bits(values: Tensor) -> Tensor:
    """Shape of `values`; the bits, least significant first in one stream, are in `elem`."""
    if hasattr(values, "elem"):  # a tied weight comes once for each use
        return values
    bits = values.numpy().reshape(-1, 1) >> np.arange(3, dtype=np.uint8) & 1
    packed = torch.zeros(values.shape, dtype=torch.uint8)
    packed.elem = torch.from_numpy(np.packbits(bits, bitorder="little"))  # type: ignore[attr-defined]
    packed.future_dtype = torch.uint3  # type: ignore[attr-defined]
    return packed
