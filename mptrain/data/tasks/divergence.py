"""What a student learns of a teacher's outputs: the loss terms of distillation.

    T² · mean over rows of KL(softmax(teacher / T) || softmax(student / T))

The factor T² keeps the gradient at the scale of the task's own (Hinton et al. 2015). A row is an example, or a token
whose label counts; of causal models the logits that predict the next label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mptrain.core.errors import ModelError

IGNORED = -100
"""target of positions that count neither in the loss nor in a score"""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of logits [..., classes], averaged over all but the last axis; float32 inside."""
    log_s = F.log_softmax(student.float() / temperature, -1)
    log_t = F.log_softmax(teacher.float() / temperature, -1)
    per_row = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return per_row.mean() * temperature**2


def bernoulli(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * mean of KL(Bernoulli(teacher / T) || Bernoulli(student / T)) over logits of one shape; float32 inside.

    Raises ModelError for shapes that differ.
    """
    same_shape("logits", student, teacher)
    ours, theirs = (logits.float() / temperature for logits in (student, teacher))
    there = theirs.sigmoid()
    terms = there * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    terms = terms + (1 - there) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return terms.mean() * temperature**2


def same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ModelError for outputs that cannot be compared."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"distill: the student's {name} have shape {tuple(student.shape)}, the teacher's"
            f" {tuple(teacher.shape)}. Give a teacher trained on the same labels (and tokenizer)."
        )


def of_logits(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Mapping[str, Tensor],
    temperature: float,
    *,
    names: Sequence[str] | None = None,
    causal: bool = False,
) -> Tensor:
    """Mean divergence over outputs [b, classes] or [b, s, classes]. names: default those that end with "logits".

    batch: with `labels` [b, s] the tokens that count. Raises ModelError for shapes that differ.
    """
    terms = []
    for name in names or [n for n in student if n.endswith("logits")]:
        ours, theirs = student[name], teacher[name]
        same_shape(name, ours, theirs)
        labels = batch.get("labels")
        if causal:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
            labels = labels[:, 1:] if labels is not None else None
        if ours.dim() == 3 and labels is not None:
            kept = labels != IGNORED
            ours, theirs = ours[kept], theirs[kept]
        terms.append(kl_divergence(ours, theirs, temperature))
    return torch.stack(terms).mean()
