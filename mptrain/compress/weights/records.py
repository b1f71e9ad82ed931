"""Compressed weights: the integers or tables that every target stores, and that are never computed again.

    BlockQuantized    w = (q - zero) · scale          one scale, and zero point, per tensor, row, or block of a row
    Palettized        w = lut[group, index] · scale   one table per group of rows, scale per row optional

A compression method makes records; `attach` writes their dense values into a plain float32
model, so that training code, scores and traces see what the target will compute, and
remembers the records for the exports. A weight with more than two dimensions is flattened
after the first; a tied weight has one record under all of its names. Rows are always the outputs:
the record of a parameter that holds them in columns, [in, out] (transformers' Conv1D), is `transposed`.

Size on a target (`stored_bytes`): integers packed to their bits; scales and tables as fp16
when each of them is an fp16 number, which the weight-only methods here see to, else as fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mptrain.core.errors import ModelError

VERSION = 1
_ATTRIBUTE = "_mptrain_records"
_AT_ONCE = 1 << 18  # weights that `dense` looks up at once


@dataclass(frozen=True, eq=False)
class BlockQuantized:
    """Integers with a scale per tensor, row or block of consecutive columns.

    q: int8 (signed, −2^(bits−1) … 2^(bits−1)−1) or uint8 (0 … 2^bits−1), [out, in].
    scale: float32 [out | 1, blocks | 1]; blocks divide `in` evenly.
    zero: None, or of scale's shape and q's dtype. bits: 1 … 8.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    transposed: bool = False

    def __post_init__(self) -> None:
        low, high = (0, 2**self.bits - 1) if self.q.dtype == torch.uint8 else (-(2 ** (self.bits - 1)),) * 2
        high = high if self.q.dtype == torch.uint8 else -low - 1
        rows, columns = self.q.shape
        _require(self.q.dtype in (torch.int8, torch.uint8), f"q must be int8 or uint8, got {self.q.dtype}")
        _require(1 <= self.bits <= 8, f"bits must be 1 to 8, got {self.bits}")
        _require(self.scale.dtype == torch.float32, f"scale must be float32, got {self.scale.dtype}")
        _require(
            self.scale.dim() == 2 and self.scale.shape[0] in (1, rows) and columns % self.scale.shape[1] == 0,
            f"scale {tuple(self.scale.shape)} does not divide a weight of {rows} × {columns} into equal blocks",
        )
        _require(bool(self.scale.isfinite().all()), "scale has values that are not finite")
        _in_range(self.q, low, high, "q")
        if self.zero is not None:
            fits = self.zero.shape == self.scale.shape and self.zero.dtype == self.q.dtype
            _require(fits, f"zero must be {self.q.dtype} of shape {tuple(self.scale.shape)}")
            _in_range(self.zero, low, high, "zero")

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    @property
    def block_size(self) -> int:
        """Columns that share a scale; the whole row when scales are per tensor or per row."""
        return self.q.shape[1] // self.scale.shape[1]

    def dense(self) -> Tensor:
        """The weight, float32 [out, in]."""
        blocks = self.q.unflatten(1, (self.scale.shape[1], -1)).float()
        if self.zero is not None:
            blocks -= self.zero.float()[..., None]
        return (blocks * self.scale[..., None]).flatten(1)

    def weight(self) -> Tensor:
        """As the parameter holds it: `dense()`, or its transpose."""
        return matrix(self.dense(), self.transposed).contiguous()


@dataclass(frozen=True, eq=False)
class Palettized:
    """Indices into look-up tables.

    indices: uint8 [out, in / cluster_dim]. lut: float32 [groups, 2^bits, cluster_dim]; rows
    g·rows_per_group … of the weight use table g, one group is one table for the tensor.
    per_channel_scale: float32 [out, 1] or None. bits: 1 … 8.
    """

    indices: Tensor
    lut: Tensor
    rows_per_group: int
    per_channel_scale: Tensor | None
    bits: int
    transposed: bool = False

    def __post_init__(self) -> None:
        rows = self.indices.shape[0]
        _require(1 <= self.bits <= 8, f"bits must be 1 to 8, got {self.bits}")
        _require(self.indices.dtype == torch.uint8, f"indices must be uint8, got {self.indices.dtype}")
        _require(self.lut.dtype == torch.float32, f"lut must be float32, got {self.lut.dtype}")
        _require(
            self.lut.dim() == 3 and self.lut.shape[1] == 2**self.bits,
            f"lut must be [groups, {2**self.bits}, cluster_dim], got {tuple(self.lut.shape)}",
        )
        _require(
            self.rows_per_group >= 1 and self.lut.shape[0] == -(-rows // self.rows_per_group),
            f"{rows} rows in groups of {self.rows_per_group} do not make {self.lut.shape[0]} tables",
        )
        _require(bool(self.lut.isfinite().all()), "lut has values that are not finite")
        _in_range(self.indices, 0, 2**self.bits - 1, "indices")
        if self.per_channel_scale is not None:
            fits = self.per_channel_scale.shape == (rows, 1) and self.per_channel_scale.dtype == torch.float32
            _require(fits, f"per_channel_scale must be float32 [{rows}, 1]")

    @property
    def shape(self) -> tuple[int, int]:
        return self.indices.shape[0], self.indices.shape[1] * self.cluster_dim

    @property
    def cluster_dim(self) -> int:
        return self.lut.shape[2]

    def dense(self) -> Tensor:
        """The weight, float32 [out, in]."""
        rows, entries = self.indices.shape
        table = self.lut.flatten(0, 1)  # [groups · 2^bits, cluster_dim]
        weight = self.lut.new_empty(rows, entries, self.cluster_dim)
        step = max(1, _AT_ONCE // entries)
        for at in range(0, rows, step):  # positions take more memory than the weight
            group = torch.arange(at, min(at + step, rows), device=table.device) // self.rows_per_group
            positions = self.indices[at : at + step].int() + (group.int() << self.bits)[:, None]
            weight[at : at + step] = table.index_select(0, positions.flatten()).view(-1, entries, self.cluster_dim)
        weight = weight.flatten(1)
        return weight if self.per_channel_scale is None else weight * self.per_channel_scale

    def weight(self) -> Tensor:
        """As the parameter holds it: `dense()`, or its transpose."""
        return matrix(self.dense(), self.transposed).contiguous()


Record = BlockQuantized | Palettized
_KINDS: dict[str, type[BlockQuantized] | type[Palettized]] = {
    "block_quantized": BlockQuantized,
    "palettized": Palettized,
}


def matrix(weight: Tensor, transposed: bool) -> Tensor:
    """[out, in] of a parameter, or of anything in its shape: flattened after the first axis, or transposed."""
    return weight.T if transposed else weight.flatten(1)


# -- on a model


@torch.no_grad()
def attach(model: nn.Module, records: Mapping[str, Record]) -> None:
    """Set each named weight to its record's dense values and remember the record on the model.

    Parameters keep their identity, so tied weights stay tied. Records that the model has of
    other weights stay. Raises ModelError for a name, shape or dtype that does not fit.
    """
    owners = {name: group[0] for group in _names(model) for name in group}
    parameters = dict(model.named_parameters())
    new: dict[str, Record] = {}
    for name, record in records.items():
        owner = owners.get(name)
        if owner is None:
            raise ModelError(f"a record is given for {name!r}, which is no parameter of the {type(model).__name__}")
        if new.get(owner, record) is not record:
            raise ModelError(f"{name} is tied to {owner}, and the two have different records: give one of them")
        weight = parameters[owner]
        if weight.dtype != torch.float32:
            raise ModelError(f"{name} is {weight.dtype}; compress the float32 model (model.float())")
        if (record.transposed and weight.dim() != 2) or matrix(weight, record.transposed).shape != record.shape:
            transposed = ", transposed" if record.transposed else ""
            raise ModelError(f"{name} is {tuple(weight.shape)}, its record is for {record.shape}{transposed}")
        new[owner] = record
    for owner, record in new.items():
        parameters[owner].copy_(record.weight().view_as(parameters[owner]))
    model.__dict__[_ATTRIBUTE] = model.__dict__.get(_ATTRIBUTE, {}) | new


@torch.no_grad()
def of(model: nn.Module) -> dict[str, Record]:
    """The records of a model by weight name; a tied weight is there under each of its names, with one record.

    Raises ModelError when a weight is no longer what its record says.
    """
    owned: dict[str, Record] = model.__dict__.get(_ATTRIBUTE, {})
    found: dict[str, Record] = {}
    for group in _names(model) if owned else ():
        record = owned.get(group[0])
        if record is None:
            continue
        weight = model.get_parameter(group[0])
        if weight.dtype != torch.float32 or not torch.equal(weight.flatten(1).cpu(), record.weight().cpu()):
            raise ModelError(
                f"{group[0]} was changed after its compression, so its stored integers are no longer the model's:"
                " compress last, or compress the model again"
            )
        found |= dict.fromkeys(group, record)
    if missing := [name for name in owned if name not in found]:
        raise ModelError(f"{missing[0]} has a record, but the model has no such weight any more: compress it again")
    return found


def forget(model: nn.Module) -> None:
    """The weights keep their values and are ordinary ones again, free to train."""
    model.__dict__.pop(_ATTRIBUTE, None)


def distinct(records: Mapping[str, Record]) -> dict[str, Record]:
    """Each record once, under the first of its names."""
    first = {id(record): name for name, record in reversed(list(records.items()))}
    return {name: records[name] for name in records if first[id(records[name])] == name}


def _names(model: nn.Module) -> Iterable[list[str]]:
    """The names of each parameter, the one of named_parameters() first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return groups.values()


def stored_bytes(record: Record) -> int:
    """Bytes of the record on a target, by the rule of the module docstring."""
    size = 0
    for name, tensor in _tensors(record).items():
        if name in ("q", "indices", "zero"):
            size += -(-tensor.numel() * record.bits // 8)
        else:
            size += tensor.numel() * (2 if _is_half(tensor) else 4)
    return size


def describe(found: Mapping[str, Record]) -> list[dict[str, Any]]:
    """A row for the report of each compressed weight; a tied one is there once."""
    rows = []
    for name, record in distinct(found).items():
        if isinstance(record, Palettized):
            groups, entries, dim = record.lut.shape
            how = f"{groups} table{'s' * (groups > 1)} of {entries}{f' vectors of {dim}' * (dim > 1)}"
            how += " and a scale per channel" * (record.per_channel_scale is not None)
            bits = record.bits / dim
        else:
            how, bits = f"blocks of {record.block_size}", float(record.bits)
        count = record.shape[0] * record.shape[1]
        rows.append({"weight": name, "bits": bits, "how": how, "count": count, "bytes": stored_bytes(record)})
    return rows


# -- on disk


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Write records, under the given names, to a safetensors file of about `stored_bytes` each."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, record in records.items():
        kind = next(kind for kind, cls in _KINDS.items() if isinstance(record, cls))
        facts[name] = {"kind": kind, "bits": record.bits} | ({"transposed": True} if record.transposed else {})
        if isinstance(record, Palettized):
            facts[name]["rows_per_group"] = record.rows_per_group
        for part, tensor in _tensors(record).items():
            stored = tensor.detach().cpu().contiguous()
            if stored.dtype == torch.float32:
                stored = stored.half() if _is_half(stored) else stored.clone()
            else:
                facts[name][part] = {"dtype": str(stored.dtype).removeprefix("torch."), "shape": list(stored.shape)}
                stored = _packed(stored, record.bits)
            tensors[f"{name}:{part}"] = stored
    save_file(tensors, path, {"format": "pt", "records": json.dumps({"version": VERSION, "weights": facts})})


def read(path: Path) -> dict[str, Record]:
    """The records of `write`, bit for bit. Raises ModelError when the file is damaged or of another version."""
    found: dict[str, Record] = {}
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {})["records"])
            if described["version"] != VERSION:
                raise ModelError(f"{path} has version {described['version']!r}, this mptrain reads {VERSION}")
            keys = set(file.keys())
            for name, facts in described["weights"].items():
                cls = _KINDS[facts["kind"]]
                values: dict[str, Any] = {}
                for part in (f.name for f in fields(cls)):
                    values[part] = facts.get(part)
                    if part == "transposed":
                        values[part] = facts.get(part, False)
                    elif f"{name}:{part}" in keys:
                        stored = file.get_tensor(f"{name}:{part}")
                        packed = facts.get(part)
                        values[part] = _unpacked(stored, facts["bits"], packed) if packed else stored.float()
                found[name] = cls(**values)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model folder is not whole, save it again") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged or truncated ({str(error)[:300]}): save the model again") from None
    return found


def _tensors(record: Record) -> dict[str, Tensor]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _is_half(tensor: Tensor) -> bool:
    return torch.equal(tensor.half().float(), tensor)


def _packed(integers: Tensor, bits: int) -> Tensor:
    """The low bits of each integer, least significant first, as one stream of bytes."""
    values = integers.numpy().reshape(-1).view(np.uint8)
    return torch.from_numpy(np.packbits(values[:, None] >> np.arange(bits, dtype=np.uint8) & 1, bitorder="little"))


def _unpacked(stream: Tensor, bits: int, facts: Mapping[str, Any]) -> Tensor:
    count = int(np.prod(facts["shape"]))
    values = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    integers = (values << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if facts["dtype"] == "int8":
        integers = (integers << (8 - bits)).view(np.int8) >> (8 - bits)  # carries the sign
    return torch.from_numpy(integers.reshape(facts["shape"]))


def _require(good: bool, problem: str) -> None:
    if not good:
        raise ModelError(f"compressed weight: {problem}")


def _in_range(integers: Tensor, low: int, high: int, what: str) -> None:
    smallest, largest = (int(value) for value in integers.aminmax())
    _require(low <= smallest and largest <= high, f"{what} must be {low} … {high}, got {smallest} … {largest}")
