"""Heads after a model, computed in the exported graph (mptrain/recipe/exports/heads.py says which there are).

    last token   of a causal LM: the last place that attention_mask counts; only its features go into the LM head
    softmax      e^x_i / Σ e^x_j                     topk    the k highest, in order, and where they are
    argmax       where the highest is                pool    Σ m_t h_t / Σ m_t, or the first token's features
    normalize    x / max(|x|₂, 1e-12)

They are a `Signature.call`: whoever runs a model by its signature, to trace it or to compare with it, gets them, and
the model stays the root of its own modules, by whose names integers and fake quantizers are found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mptrain.core.embeddings import output_embedding
from mptrain.core.errors import UserError
from mptrain.core.signature import BATCH, MASK, Batch, Outputs, Port, Signature, by_name
from mptrain.data.tasks.agreement import array
from mptrain.recipe import TaskSpec
from mptrain.recipe.exports.heads import Head

VECTOR, PROBABILITIES, VALUES, INDICES = "sentence_embedding", "probabilities", "values", "indices"


def signature_with(signature: Signature, heads: Sequence[Head], kind: TaskSpec) -> Signature:
    """The signature of the model with heads after its first output, which alone is left.

    Raises UserError for topk of more classes than there are, where the signature knows how many.
    """
    if not heads:
        return signature
    first = signature.outputs[0]
    axes = (BATCH, *first.axes[2:]) if kind.causal else first.axes
    port, indices = replace(first, axes=axes), None
    for head in heads:
        rest, last = port.axes[:-1], port.axes[-1]
        if head.topk is not None:
            if isinstance(last, int) and head.topk > last:
                raise UserError(f"heads: topk {head.topk} of {last} classes; give at most {last}")
            port = Port(VALUES, (*rest, head.topk), port.dtype)
            indices = Port(INDICES, port.axes, "int64")
        elif head.softmax:
            port = port if indices else replace(port, name=PROBABILITIES)
        elif head.argmax:
            port = Port(INDICES, rest, "int64")
        elif head.pool:
            port = Port(VECTOR, (BATCH, *port.axes[2:]), port.dtype)
    outputs = (port,) if indices is None else (port, indices)
    return replace(signature, outputs=outputs, call=WithHeads(tuple(heads), first.name, kind.causal, signature.call))


def check_vocabulary(heads: Sequence[Head], config: Any, where: str = "") -> None:
    """Raises UserError for topk of more tokens than a language model of the config knows."""
    words = getattr(config.get_text_config(), "vocab_size", None)
    for head in heads:
        if head.topk is not None and words is not None and head.topk > words:
            raise UserError(f"{where}heads: topk {head.topk} of the {words} tokens that the model knows; give fewer")


@dataclass(frozen=True)
class WithHeads:
    """output: of the model, that the first head reads. last: on the last token alone. call: of the model itself."""

    heads: tuple[Head, ...]
    output: str
    last: bool
    call: Callable[[nn.Module, Mapping[str, Any]], Any]

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        mask = inputs.get(MASK)
        if self.last:
            with _before_head(model, lambda x: _at(x, _last_places(inputs["input_ids"], mask))) as early:
                x = by_name(self.call(model, inputs))[self.output]
            x = x if early else _at(x, _last_places(inputs["input_ids"], mask))
            x = x[:, 0]
        else:
            x = by_name(self.call(model, inputs))[self.output]
        found: dict[str, Tensor] = {}
        name = self.output
        for head in self.heads:
            if head.topk is not None:
                x, found[INDICES] = x.topk(head.topk, dim=-1)
                name = VALUES
            elif head.softmax:
                x, name = x.softmax(-1), VALUES if INDICES in found else PROBABILITIES
            elif head.argmax:
                x, name = x.argmax(-1), INDICES
            elif head.pool:
                x, name = _pooled(x, mask, head.pool), VECTOR
            else:
                x = functional.normalize(x, dim=-1)
        return {name: x, **found}


def _last_places(ids: Tensor, mask: Tensor | None) -> Tensor:
    """[b], of the tokens ids [b, n]. mask: [b, n], or longer where places before them are in a cache."""
    count = ids.shape[1]
    places = torch.arange(count, device=ids.device)
    if mask is None:
        return (places[None] + torch.zeros_like(ids)).amax(1)
    return (mask[:, mask.shape[1] - count :].to(torch.int64) * places).amax(1)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x [b, n, d] at places [b], as [b, 1, d]."""
    return x.gather(1, places[:, None, None].expand(-1, 1, x.shape[2]))


@contextmanager
def _before_head(model: nn.Module, chosen: Callable[[Tensor], Tensor]) -> Iterator[bool]:
    """Within it, only chosen places go into the LM head, where the model knows such a choice itself (logits_to_keep);
    yields whether it does. Of a prompt the product with the vocabulary is otherwise the largest of all."""
    embeddings = output_embedding(model)
    if embeddings is None or "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        yield False
        return
    handle = embeddings.register_forward_pre_hook(lambda _, args: (chosen(args[0]), *args[1:]), prepend=True)
    try:
        yield True
    finally:
        handle.remove()


def _pooled(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """x [b, n, d] to [b, d]. With cls, the first token that the mask counts: padding may stand on the left."""
    if mask is None:
        return x.mean(1) if how == "mean" else x[:, 0]
    if how == "mean":
        counted = mask[:, :, None].to(x.dtype)
        return (x * counted).sum(1) / counted.sum(1).clamp(min=1.0)
    counted, last = mask.to(torch.int64), x.shape[1] - 1
    places = torch.arange(x.shape[1], device=x.device)
    return _at(x, (places * counted + last * (1 - counted)).amin(1))[:, 0]


# -- what a task makes of such outputs


def restored(outputs: Outputs, batch: Mapping[str, Any]) -> Outputs:
    """Outputs that the task's scores can be read from, of heads that keep them (`keep_score`): logarithms of
    probabilities are logits, and all tokens of a text have its vector."""
    found: dict[str, Any] = dict(outputs)
    if PROBABILITIES in found:
        smallest = np.finfo(np.float32).tiny
        found["logits"] = np.log(np.maximum(array(found.pop(PROBABILITIES)).astype(np.float32), smallest))
    if VECTOR in found:
        vector = array(found.pop(VECTOR))
        found["last_hidden_state"] = np.repeat(vector[:, None], array(batch[MASK]).shape[1] if MASK in batch else 1, 1)
    return found


def agreement(task: Any, heads: Sequence[Head]) -> Callable[[Outputs, Outputs, Batch], np.ndarray]:
    """Of a task class with these heads: its own, on what it can read; of indices, the share that both chose."""
    if not heads:
        return task.agreement

    def of_heads(expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        if INDICES not in expected:
            if task.kind.causal:
                ours, theirs = (array(outputs[PROBABILITIES]).argmax(-1) for outputs in (expected, got))
                return (ours == theirs).astype(np.float64).reshape(-1)
            return task.agreement(restored(expected, batch), restored(got, batch), batch)
        ours, theirs = array(expected[INDICES]).astype(np.int64), array(got[INDICES]).astype(np.int64)
        if not any(head.topk for head in heads):
            ours, theirs = ours[..., None], theirs[..., None]
        common = (ours[..., :, None] == theirs[..., None, :]).any(-1).mean(-1)
        kept = array(batch[MASK]).astype(bool) if MASK in batch else None
        return (common[kept] if kept is not None and common.ndim == 2 else common).reshape(-1)

    return of_heads
