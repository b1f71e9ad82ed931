"""Modules that stand in the places of others in a model whose code is not ours, as config.json names them (saved.py).

A kind is a class that has a `size`, an integer that says all that the module in whose place it stands does not, and
`in_place_of(module, size)`, which builds it with values that are to be loaded, and raises ValueError where it cannot
stand there.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from mptrain.compress.structure.dropped import Constant, Zeros
from mptrain.compress.structure.low_rank import LowRank


class StandIn(Protocol):
    @classmethod
    def in_place_of(cls, module: nn.Module, size: int) -> nn.Module: ...


KINDS: dict[str, type[StandIn]] = {"zeros": Zeros, "constant": Constant, "low_rank": LowRank}


def build(module: nn.Module, kind: str, size: int) -> nn.Module:
    """What stands in the place of a module in a model that is loaded. Raises ValueError for what cannot."""
    if kind not in KINDS or type(size) is not int:
        raise ValueError(f"{kind} of {size} is no {', '.join(KINDS)} of a whole number")
    return KINDS[kind].in_place_of(module, size)


def described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Those of a model, by the names of the modules in whose places they are: {"kind", "size"}."""
    found = {}
    for name, module in model.named_modules():
        kind = next((kind for kind, cls in KINDS.items() if type(module) is cls), None)
        if kind is not None:
            found[name] = {"kind": kind, "size": module.size}
    return found
