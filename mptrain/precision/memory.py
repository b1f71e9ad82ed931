"""What training takes in memory under each precision, before anything is trained.

    bytes a parameter       weights  masters  remainder  gradients  moments   sum
    fp32                       4        -         -          4         8       16
    fp16-master, bf16-master   2        4         -          2         8       16
    bf16-split                 2        -         2          2         8       14
    bf16-split-int8            2        -         2          2         2.03     8.03

The moments are AdamW's. A parameter kept in fp32 takes what it takes under fp32, a tied one counts once, and
buffers start at multiples of 16 elements (64 with moments of 8 bits), so the sum is what `MasterWeights` allocates.
Accumulation of half gradients in fp32 takes 4 more. Activations are not counted: they depend on the batch.

Under FSDP2 each of N processes holds a part, and gathers what it computes with:

    shards     12 / N bytes a parameter for masters and moments, 4 / N for gradients, rounded up to whole rows
    gathered   what stands outside the repeated blocks, two blocks (one is fetched while the other computes), and the
               gradients of one, also as the fp32 that is summed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from mptrain.core.embeddings import token_embedding
from mptrain.core.errors import UserError
from mptrain.precision import moments8
from mptrain.precision.flat import ALIGN
from mptrain.precision.policy import Compute, Master, Moments, Policy, kept_in_fp32
from mptrain.recipe import MixedPrecision


class Dtypes(NamedTuple):
    compute: Compute
    master: Master = "fp32"
    moments: Moments = "fp32"


PRECISIONS: dict[str, Dtypes | None] = {
    "fp32": None,
    "fp16-master": Dtypes("fp16"),
    "bf16-master": Dtypes("bf16"),
    "bf16-split": Dtypes("bf16", "split"),
    "bf16-split-int8": Dtypes("bf16", "split", "int8"),
}
"""by short name"""


@dataclass(frozen=True)
class Memory:
    """Bytes while training with AdamW. weights: what forward reads; masters hold the kept ones too."""

    precision: str
    parameters: int
    kept_fp32: int
    """of the parameters"""
    weights: int
    masters: int
    remainders: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.remainders + self.gradients + self.moments

    @property
    def per_parameter(self) -> float:
        return self.total / max(self.parameters, 1)


def predict(model: nn.Module, precision: str, keep_fp32: Sequence[str] = ()) -> Memory:
    """Memory of training all floating parameters of `model` under a precision of `PRECISIONS`.

    Raises ModelError for a pattern of keep_fp32 that matches nothing or everything.
    """
    sizes = {id(p): p.numel() for p in model.parameters() if p.is_floating_point()}
    count = sum(sizes.values())
    chosen = PRECISIONS[precision]
    if chosen is None:
        return Memory(precision, count, count, 4 * count, 0, 0, 4 * count, 8 * count)
    kept = kept_in_fp32(model, _policy(chosen, keep_fp32)).parameters
    fp32, half = ([n for i, n in sizes.items() if (i in kept) == wanted] for wanted in (True, False))
    split, coded = chosen.master == "split", chosen.moments == "int8"
    aligned = _aligned(half, moments8.BLOCK if coded else ALIGN)
    return Memory(
        precision,
        count,
        sum(fp32),
        weights=2 * aligned + _aligned(fp32) * 4,
        masters=0 if split else 4 * aligned,
        remainders=2 * aligned if split else 0,
        gradients=2 * sum(half) + 4 * sum(fp32),
        moments=(moments8.size(aligned) if coded else 8 * aligned) + 8 * _aligned(fp32),
    )


def predict_sharded(model: nn.Module, precision: str, processes: int, keep_fp32: Sequence[str] = ()) -> Memory:
    """The same of the process that holds most, where FSDP2 shards the model over `processes`.

    Raises ModelError for a pattern of keep_fp32 that matches nothing or everything, UserError for split masters.
    """
    chosen = PRECISIONS[precision]
    if why := MixedPrecision.model_validate(precision).why_not_sharded():
        raise UserError(why)
    parameters = {id(p): p for p in model.parameters() if p.is_floating_point()}
    policy = None if chosen is None else _policy(chosen, keep_fp32)
    kept = set(parameters) if policy is None else kept_in_fp32(model, policy).parameters

    def gathered(members: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (4 if id(p) in kept else 2) for p in members)

    rows = {i: p.shape[0] if p.dim() else 1 for i, p in parameters.items() if p.numel()}
    shards = sum(-(-n // processes) * (parameters[i].numel() // n) for i, n in rows.items())
    inside = [list(block.parameters()) for block in blocks(model)]
    names = {id(p) for block in inside for p in block}
    largest = max((gathered(block) for block in inside), default=0)
    summed = max((sum(4 * p.numel() for p in block) for block in inside), default=0)
    return Memory(
        precision,
        sum(p.numel() for p in parameters.values()),
        sum(p.numel() for i, p in parameters.items() if i in kept),
        weights=gathered(p for i, p in parameters.items() if i not in names) + 2 * largest,
        masters=4 * shards,
        remainders=0,
        gradients=4 * shards + largest + summed,
        moments=8 * shards,
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated ones that FSDP2 gathers one at a time; not those around the input embedding, nor in another."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    table = token_embedding(model)
    found = [m for m in model.modules() if type(m).__name__ in names and m is not model]
    found = [m for m in found if table not in set(m.modules())]
    return [m for m in found if not any(m is not o and m in set(o.modules()) for o in found)]


def _policy(dtypes: Dtypes, keep_fp32: Sequence[str]) -> Policy:
    return Policy(dtypes.compute, dtypes.master, keep_fp32=keep_fp32, moments=dtypes.moments)


def _aligned(sizes: Sequence[int], align: int = ALIGN) -> int:
    return sum(-(-n // align) * align for n in sizes)
