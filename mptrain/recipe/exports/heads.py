"""What an export computes after the model, in its own graph: the `heads` of an entry, in order.

    scores of classes or tokens    softmax, topk in any order, or argmax alone
    features of tokens             pool to one vector, normalize to length 1

A causal language model has them on the last token of each text alone. The math is mptrain/export/torch/heads.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mptrain.recipe.base import Strict
from mptrain.recipe.task import TaskSpec

OF: dict[str | None, tuple[str, ...]] = {
    "classes": ("softmax", "topk", "argmax"),
    "labels": ("topk",),
    "features": ("pool", "normalize"),
    None: (),
}
"""by what the models of a task give (TaskSpec.gives)"""
_POINTLESS = {
    ("softmax", "argmax"): "argmax chooses the same without softmax before it; drop softmax",
    ("topk", "argmax"): "the first of topk is what argmax chooses; drop one of them",
}


class Head(Strict):
    """One of these to an item."""

    topk: Annotated[int, Field(gt=0)] | None = Field(
        None, description="the so many highest scores (output `values`) and their classes (`indices`), highest first"
    )
    softmax: Literal[True] | None = Field(
        None, description="scores as probabilities (`probabilities`); after topk those of the chosen alone"
    )
    argmax: Literal[True] | None = Field(None, description="the class with the highest score alone (`indices`)")
    pool: Literal["mean", "cls"] | None = Field(
        None, description="one vector of a text's tokens (`sentence_embedding`): their mean, or the first one's"
    )
    normalize: Literal[True] | None = Field(None, description="vectors divided by their length")

    @model_validator(mode="after")
    def _one(self):
        if len([name for name in Head.model_fields if getattr(self, name) is not None]) != 1:
            raise ValueError(f"a head is one of {', '.join(Head.model_fields)}, e.g. topk: 20; write a list of them")
        return self

    @property
    def kind(self) -> str:
        return next(name for name in Head.model_fields if getattr(self, name) is not None)

    @property
    def words(self) -> str:
        """ "topk 20" """
        value = getattr(self, self.kind)
        return self.kind if value is True else f"{self.kind} {value}"


def _ordered(heads: list[Head]) -> list[Head]:
    kinds = [head.kind for head in heads]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ValueError(f"{twice[0]} is there twice; drop one")
    if not any(set(kinds) <= set(known) for known in OF.values()):
        raise ValueError(
            f"{' and '.join(kinds)} go with no model together: {', '.join(OF['classes'])} are of scores,"
            f" {' and '.join(OF['features'])} of features"
        )
    for pair, why in _POINTLESS.items():
        if set(pair) <= set(kinds):
            raise ValueError(why)
    if "pool" in kinds[1:]:
        raise ValueError("pool comes first: normalize then gives the pooled vector the length 1; write it before")
    return heads


Heads = Annotated[list[Head], AfterValidator(_ordered)]


def misfit(heads: Sequence[Head], kind: TaskSpec) -> str | None:
    """What to say of heads that the models of a task cannot have; None where they can."""
    able = OF[kind.gives]
    wrong = [head.kind for head in heads if head.kind not in able]
    if not wrong:
        return None
    has = f"its models can have {', '.join(able)}" if able else "its models can have none"
    return f"{wrong[0]} is no head for task {kind.name}, {has}; drop it"


def keep_score(heads: Sequence[Head], kind: TaskSpec) -> bool:
    """Whether the outputs still hold all that the scores of the task are made of."""
    return not heads or (not kind.causal and all(head.kind in ("softmax", "pool", "normalize") for head in heads))
