"""Distillation: the student learns the teacher's outputs.

    loss = (1 - w) * task + w * term
           + hidden * mean_layers MSE(h_s, h_t) + attention * mean_layers MSE(mean_heads a_s, mean_heads a_t)
           + relations * mean_layers KL(R_t || R_s)

The term says what is learned of the outputs; a task has its own, logits are compared as `divergence` says. Heads of a
pruned student differ in number from the teacher's, so attention maps are compared as averages over heads (Jiao et
al. 2020 compare them one by one); relations between tokens need no maps (relations.py). Hidden states of another width
than the teacher's have no difference: there the cosines between the tokens of a text are compared (Tung and Mori 2019
do so between the examples of a batch). Padding counts in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.core.embeddings import token_embedding
from mptrain.core.errors import ModelError
from mptrain.core.signature import TOKENS
from mptrain.data.tasks.divergence import of_logits
from mptrain.recipe import Distill
from mptrain.train.relations import Layers, divergence, paired, recorded
from mptrain.train.replaced import replaced

TARGETS = ("labels", "start_positions", "end_positions")
Term = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Tensor], float], Tensor]
"""(outputs of the student, of the teacher, the batch with targets, temperature) to a scalar"""


@dataclass(frozen=True)
class Terms:
    """The parts of a loss, scalars."""

    total: Tensor
    task: Tensor
    distill: Tensor


class Distiller:
    """Runs the teacher beside the student and mixes the losses.

    The teacher is put in eval mode, its parameters are frozen. term: what is learned of its outputs (default: the
    logits; of a causal model give partial(divergence.of_logits, causal=True), or its task's `distillation`).
    targets: entries of a batch that it does not get. ids: int64 [tokens of the student], the id that the teacher knows
    each by; None where both have the same.
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: Distill,
        *,
        term: Term = of_logits,
        targets: Sequence[str] = TARGETS,
        ids: Tensor | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config
        self.term, self.targets, self.ids = term, targets, ids
        self._layers: tuple[Layers, Layers] | None = None
        self._related: list[list[Tensor]] = []

    def shown(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What student and teacher read of a batch: with some tokens replaced, where the settings say so.
        Raises ModelError."""
        if not self.config.replace_tokens:
            return inputs
        if "input_ids" not in inputs:
            raise ModelError("distill.replace_tokens: the batch has no input_ids; drop it")
        shape = inputs["input_ids"].shape
        if any(t in inputs and inputs[t].shape == shape and not inputs[t].is_floating_point() for t in self.targets):
            raise ModelError("distill.replace_tokens: the targets are those of each token; drop it")
        ids = replaced(inputs["input_ids"], inputs.get("attention_mask"), self.config.replace_tokens)
        return {**inputs, "input_ids": ids}

    @contextmanager
    def watching(self, student: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Around the forward pass of the student whose outputs are then given: keeps what is compared inside of it.
        inputs: the batch.
        Raises ModelError."""
        if not self.config.relations:
            yield
            return
        if self._layers is None:
            plain = {k: v for k, v in inputs.items() if k not in self.targets}
            self._layers = paired(student, self.teacher, plain)
        with recorded(student, self._layers[0]) as found:
            yield
        self._related = found()

    def extra_outputs(self) -> dict[str, bool]:
        """Arguments the student's forward needs, so that it returns what is compared."""
        wanted = {}
        if self.config.hidden:
            wanted["output_hidden_states"] = True
        if self.config.attention:
            wanted["output_attentions"] = True
        return wanted

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Any], task: Tensor) -> Terms:
        """inputs: the batch with labels; outputs: the student's logits [batch, (length,) classes]; task: its loss."""
        with torch.no_grad(), recorded(self.teacher, self._layers[1] if self._layers else []) as taught:
            plain = {k: v for k, v in inputs.items() if k not in self.targets}
            expected = self._taught(plain)
        distill = self.term(outputs, expected, inputs, self.config.temperature)
        total = (1 - self.config.weight) * task + self.config.weight * distill
        mask = inputs.get("attention_mask")
        if self.config.hidden:
            total = total + self.config.hidden * _hidden(outputs["hidden_states"], expected["hidden_states"], mask)
        if self.config.attention:
            total = total + self.config.attention * _attention(outputs["attentions"], expected["attentions"], mask)
        if self._layers is not None:
            terms = [divergence(s, t, mask) for s, t in _aligned(self._related, taught())]
            total, self._related = total + self.config.relations * torch.stack(terms).mean(), []
        return Terms(total, task.detach(), distill.detach())

    def _taught(self, inputs: dict[str, Tensor]) -> Any:
        """What the teacher gives, of the student's tokens alone where it gives something of each."""
        if self.ids is None:
            return self.teacher(**inputs, **self.extra_outputs())
        table = token_embedding(self.teacher)
        assert isinstance(table, nn.Embedding)
        self.ids = self.ids.to(table.weight.device)
        inputs = {k: self.ids[v] if k in TOKENS else v for k, v in inputs.items()}
        found = self.teacher(**inputs, **self.extra_outputs())
        logits = found.get("logits")
        if logits is not None and logits.shape[-1] == table.num_embeddings:
            found["logits"] = logits.index_select(-1, self.ids)
        return found


def _hidden(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """The mean over layers; a deeper teacher is sampled evenly."""
    return torch.stack([_states(s, t, mask) for s, t in _aligned(student, teacher)]).mean()


def _states(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of hidden states [batch, length, width]; of their similarities, where the widths differ."""
    s, t = student.float(), teacher.float()
    if s.shape == t.shape:
        return _mean((s - t).pow(2).mean(-1), mask)
    if s.shape[:-1] != t.shape[:-1] or s.dim() != 3:
        raise ModelError(
            f"distill.hidden: hidden states of the student have shape {tuple(s.shape)}, the teacher's"
            f" {tuple(t.shape)}. Use a teacher that reads as many tokens, or set hidden: 0."
        )
    return _pairs((_similarities(s) - _similarities(t)).pow(2), mask)


def _similarities(states: Tensor) -> Tensor:
    """Cosines [batch, length, length] between the tokens of a text."""
    unit = F.normalize(states, dim=-1)
    return unit @ unit.transpose(-1, -2)


def _attention(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Mean squared error of attention maps [batch, heads, query, key] averaged over heads."""
    if not student or student[0] is None:
        raise ModelError("distill.attention needs attention maps: set model.attn: eager (sdpa does not return them).")
    maps = [(s.float().mean(1), t.float().mean(1)) for s, t in _aligned(student, teacher)]
    return torch.stack([_pairs((s - t).pow(2), mask) for s, t in maps]).mean()


def _pairs(value: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of [batch, length, length] over pairs of tokens that are no padding."""
    return _mean(value, None if mask is None or mask.dim() != 2 else mask[:, :, None] * mask[:, None, :])


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    """Over what counts; over all of what a mask does not fit, such as the patches of a picture."""
    if mask is None or mask.shape != value.shape:
        return value.mean()
    return (value * mask).sum() / mask.sum()


def _aligned(student: Sequence[Any], teacher: Sequence[Any]) -> list[tuple[Any, Any]]:
    last_s, last_t = len(student) - 1, len(teacher) - 1
    return [(s, teacher[round(i * last_t / last_s) if last_s else last_t]) for i, s in enumerate(student)]
