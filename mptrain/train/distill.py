"""Distillation: the student learns the teacher's outputs.

    loss = (1 - w) * task + w * T^2 * mean_positions KL(softmax(t / T) || softmax(s / T))
           + hidden * mean_layers MSE(h_s, h_t) + attention * mean_layers MSE(mean_heads a_s, mean_heads a_t)

The factor T^2 keeps the gradient of the KL term at the scale of the task's (Hinton et al.
2015). A position counts where its label does (label != -100); causal models compare the
logits that predict the next label. Heads of a pruned student differ in number from the
teacher's, so attention maps are compared as averages over heads (Jiao et al. 2020 compare
them one by one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.core.errors import ModelError
from mptrain.recipe import Distill

LOGITS = ("logits", "start_logits", "end_logits")
LABELS = ("labels", "start_positions", "end_positions")


@dataclass(frozen=True)
class Terms:
    """The parts of a loss, scalars."""

    total: Tensor
    task: Tensor
    distill: Tensor


class Distiller:
    """Runs the teacher beside the student and mixes the losses.

    The teacher is put in eval mode, its parameters are frozen.
    """

    def __init__(self, teacher: nn.Module, config: Distill, *, causal: bool = False) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config
        self.causal = causal

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
        with torch.no_grad():
            plain = {k: v for k, v in inputs.items() if k not in LABELS}
            expected = self.teacher(**plain, **self.extra_outputs())
        distill = self._logits(inputs, outputs, expected)
        total = (1 - self.config.weight) * task + self.config.weight * distill
        mask = inputs.get("attention_mask")
        if self.config.hidden:
            total = total + self.config.hidden * _hidden(outputs["hidden_states"], expected["hidden_states"], mask)
        if self.config.attention:
            total = total + self.config.attention * _attention(outputs["attentions"], expected["attentions"])
        return Terms(total, task.detach(), distill.detach())

    def _logits(self, inputs: Mapping[str, Tensor], outputs: Mapping, expected: Mapping) -> Tensor:
        names = [n for n in LOGITS if n in outputs]
        terms = []
        for name in names:
            student, teacher = outputs[name], expected[name]
            if student.shape != teacher.shape:
                raise ModelError(
                    f"distill: the student's {name} have shape {tuple(student.shape)}, the teacher's"
                    f" {tuple(teacher.shape)}. Give a teacher trained on the same labels (and tokenizer)."
                )
            labels = inputs.get("labels")
            if self.causal:
                student, teacher = student[:, :-1], teacher[:, :-1]
                labels = labels[:, 1:] if labels is not None else None
            if student.dim() == 3 and labels is not None:
                keep = labels != -100
                student, teacher = student[keep], teacher[keep]
            terms.append(kl_divergence(student, teacher, self.config.temperature))
        return torch.stack(terms).mean()


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of logits [..., classes], averaged over all but the last axis; float32 inside."""
    log_s = F.log_softmax(student.float() / temperature, -1)
    log_t = F.log_softmax(teacher.float() / temperature, -1)
    per_row = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return per_row.mean() * temperature**2


def _hidden(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Mean squared error of hidden states [batch, length, width]; a deeper teacher is sampled evenly."""
    pairs = _aligned(student, teacher)
    for s, t in pairs:
        if s.shape != t.shape:
            raise ModelError(
                f"distill.hidden: hidden states of the student have shape {tuple(s.shape)}, the teacher's"
                f" {tuple(t.shape)}. Use a teacher of the same width, or set hidden: 0."
            )
    terms = []
    for s, t in pairs:
        squared = (s.float() - t.float()).pow(2).mean(-1)
        if mask is not None and mask.shape == squared.shape:
            terms.append((squared * mask).sum() / mask.sum())
        else:
            terms.append(squared.mean())
    return torch.stack(terms).mean()


def _attention(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of attention maps [batch, heads, query, key] averaged over heads."""
    if not student or student[0] is None:
        raise ModelError("distill.attention needs attention maps: set model.attn: eager (sdpa does not return them).")
    pairs = _aligned(student, teacher)
    return torch.stack([F.mse_loss(s.float().mean(1), t.float().mean(1)) for s, t in pairs]).mean()


def _aligned(student: tuple, teacher: tuple) -> list[tuple[Tensor, Tensor]]:
    last_s, last_t = len(student) - 1, len(teacher) - 1
    return [(s, teacher[round(i * last_t / last_s) if last_s else last_t]) for i, s in enumerate(student)]
