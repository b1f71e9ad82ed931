"""How much of a model a weight method covers, as a share of all its parameters, and what it leaves alone.

A method knows layers by their kind. What a model holds elsewhere (experts fused into one parameter, recurrent
layers, a layer of its own code) stays in floating point, and a small file is promised that does not come. So what
is left is always said, and less than half is an error unless it is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mptrain.core.errors import UserError

LEAST = 0.5


@dataclass(frozen=True)
class Coverage:
    """Parameters that are covered, of all. left: what is not, by class and attribute, the most first."""

    covered: int
    total: int
    left: dict[str, int]

    @property
    def share(self) -> float:
        return self.covered / max(1, self.total)

    def facts(self) -> dict[str, Any]:
        """JSON facts for the report: shares of all parameters."""
        return {"covered": self.share, "left": {what: count / self.total for what, count in self.left.items()}}

    def words(self, most: int = 4) -> str:
        """98.3% of the parameters; left in floating point: Embedding.weight 1.2%, LayerNorm.weight 0.3%"""
        named = [f"{what} {_percent(count / self.total)}" for what, count in list(self.left.items())[:most]]
        more = [f"{len(self.left) - most} kinds more"] if len(self.left) > most else []
        left = f"; left in floating point: {', '.join(named + more)}" if named else ""
        return f"{_percent(self.share)} of the parameters{left}"


def coverage(model: nn.Module, names: Iterable[str]) -> Coverage:
    """names: of the parameters that a method covers; each shared parameter counts once."""
    covered = {id(model.get_parameter(name)) for name in names}
    left: Counter[str] = Counter()
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) not in covered:
            owner, _, attribute = name.rpartition(".")
            left[f"{type(model.get_submodule(owner)).__name__}.{attribute}"] += parameter.numel()
    return Coverage(total - sum(left.values()), total, dict(left.most_common()))


def check(found: Coverage, field: str, kinds: str, *, allow_partial: bool) -> None:
    """Raise UserError where less than half of the parameters are covered. field: quantize or palettize."""
    if found.share < LEAST and not allow_partial:
        raise UserError(
            f"{field}: covers only {found.words()}. It knows the weights of {kinds}. Let {field}.ignore and"
            f" {field}.embeddings leave less alone, or say with --allow-partial ({field}.allow_partial: true) that this"
            " is meant."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.0005 else "under 0.1%"
