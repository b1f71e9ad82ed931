"""How tokens relate to one another in the queries, keys and values of an attention (Wang et al. 2021, MiniLMv2).

    R(x) = softmax(x xᵀ / sqrt(width)),    x [tokens, width] the output of a projection, all heads together
    loss = mean over layers, projections and tokens of KL(R(teacher) || R(student))

Neither the number of heads nor their width has to be the teacher's, and no attention maps are asked for, so any
attention implementation will do. Padding is no key, and counts as no query. The paper relates within a chosen number
of heads; here, where a student's heads are those that pruning left, all are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mptrain.compress.structure import stand_ins
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import ModelError

Layers = list[list[str]]
"""of each attention the modules that make its queries, keys and values, in the model's order"""


def projections(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Layers:
    """Raises ModelError where no attention is found."""
    modules = dict(model.named_modules())
    found = []
    for block in find_structure(model, example).of_kind("heads"):
        names = [axis.parameter.rpartition(".")[0] for axis in block.axes if axis.role == "source"]
        weights = [name for name in dict.fromkeys(names) if getattr(modules.get(name), "weight", None) is not None]
        if weights:
            found.append(weights)
    if not found:
        raise ModelError(
            f"distill.relations: no attention of {type(model).__name__} was found (`mptrain inspect` says why); drop"
            " relations."
        )
    return found


def paired(
    student: nn.Module, teacher: nn.Module, example: Mapping[str, Tensor] | None = None
) -> tuple[Layers, Layers]:
    """Of the student and of the teacher what is compared: the attentions that both have, where one is made of the
    other, and else all. Raises ModelError where there are none."""
    layers, known = projections(teacher, example), dict(student.named_modules())
    if not all(name in known for layer in layers for name in layer):
        return projections(student, example), layers
    gone = stand_ins.described(student)  # what stands in its place relates nothing
    left = [layer for layer in layers if gone.keys().isdisjoint(layer)]
    if not left:
        raise ModelError(
            "distill.relations: pruning has left no attention of the teacher's in the student; use hidden instead, or"
            " drop relations."
        )
    return left, left


@contextmanager
def recorded(model: nn.Module, layers: Layers) -> Iterator[Callable[[], list[list[Tensor]]]]:
    """Gives a function that, after a forward pass within, returns [batch, length, width] of each projection of each
    layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        found[name] = output

    names = [name for layer in layers for name in layer]
    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield lambda: [[found[name] for name in layer] for layer in layers]
    finally:
        for handle in handles:
            handle.remove()


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Of a layer's projections, a scalar; float32 inside. mask: [batch, length], where tokens are."""
    if len(student) != len(teacher):
        raise ModelError(
            f"distill.relations: the student's attention has {len(student)} projections, the teacher's {len(teacher)}"
            " (one of them makes queries, keys and values at once); use hidden instead."
        )
    return torch.stack([_divergence(ours, theirs, mask) for ours, theirs in zip(student, teacher)]).mean()


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.dim() != 3 or student.shape[:-1] != teacher.shape[:-1]:
        raise ModelError(
            f"distill.relations: a projection of the student gives {tuple(student.shape)}, the teacher's"
            f" {tuple(teacher.shape)}; both have to give a row to each token, and to read as many."
        )
    kept = None if mask is None or mask.shape != student.shape[:-1] else mask.bool()
    ours, theirs = _relations(student, kept), _relations(teacher, kept)
    terms = theirs.exp() * (theirs - ours)
    if kept is None:
        return terms.sum(-1).mean()
    both = kept[:, :, None] & kept[:, None, :]
    return terms.masked_fill(~both, 0.0).sum() / kept.sum()


def _relations(values: Tensor, kept: Tensor | None) -> Tensor:
    """Logarithms [batch, length, length]."""
    values = values.float()
    scores = values @ values.transpose(-1, -2) / values.shape[-1] ** 0.5
    if kept is not None:
        scores = scores.masked_fill(~kept[:, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)
