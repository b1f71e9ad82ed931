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

import inspect
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
from mptrain.data.tasks.divergence import IGNORED, of_logits
from mptrain.recipe import Distill
from mptrain.train.relations import Layers, divergence, paired, projections, recorded
from mptrain.train.replaced import replaced
from mptrain.train.taught import Taught

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
        self._sound = False
        self.taught: Taught | None = None
        """what it says, where it was asked before; for outputs alone"""

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
        return asked(self.config)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Any], task: Tensor) -> Terms:
        """inputs: the batch with labels; outputs: the student's logits [batch, (length,) classes]; task: its loss."""
        with torch.no_grad(), recorded(self.teacher, self._layers[1] if self._layers else []) as taught:
            plain = {k: v for k, v in inputs.items() if k not in self.targets}
            expected = (self.taught and self.taught.of(plain)) or self.ask(plain)
        if not self._sound:
            self._check_finite(expected)
        distill = self.term(outputs, expected, inputs, self.config.temperature)
        total = (1 - self.config.weight) * task + self.config.weight * distill
        mask = inputs.get("attention_mask")
        masks = mask, _target_mask(inputs)
        if self.config.hidden:
            pairs = _layers(outputs, expected, "hidden_states", masks)
            total = total + self.config.hidden * torch.stack([_states(s, t, rows) for s, t, rows, _ in pairs]).mean()
        if self.config.attention:
            pairs = _layers(outputs, expected, "attentions", masks)
            total = total + self.config.attention * torch.stack([_maps(*pair) for pair in pairs]).mean()
        if self._layers is not None:
            terms = [divergence(s, t, mask) for s, t in _aligned(self._related, taught())]
            total, self._related = total + self.config.relations * torch.stack(terms).mean(), []
        return Terms(total, task.detach(), distill.detach())

    def _check_finite(self, expected: Any) -> None:
        """At the first batch: a student of a teacher that says nothing learns nothing. Raises ModelError."""
        for name, value in expected.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                broken = [n for n, p in self.teacher.named_parameters() if not p.isfinite().all()]
                why = f": {len(broken)} of its parameters are not finite (first: {broken[0]})" if broken else ""
                raise ModelError(f"the teacher's {name} are nan{why}. Give another teacher, or train it again.")
        self._sound = True

    def ask(self, inputs: Mapping[str, Tensor]) -> Any:
        """What the teacher gives for a batch without targets; where it is of each token, of the student's alone."""
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


def asked(config: Distill) -> dict[str, bool]:
    """Arguments with which the models of transformers return what is compared inside of them."""
    wanted = {"output_hidden_states": config.hidden, "output_attentions": config.attention}
    return {name: True for name, weight in wanted.items() if weight}


def check_asked(config: Distill, model: nn.Module) -> None:
    """That a model can be asked for what is compared inside of it. Raises ModelError."""
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return
    for name in asked(config).keys() - {parameter.name for parameter in taken}:
        raise ModelError(
            f"distill.{'hidden' if 'hidden' in name else 'attention'}: the forward of {type(model).__name__} takes no"
            f" {name}, with which models of transformers return it; drop it, or use relations."
        )


def check_terms(config: Distill, model: nn.Module, inputs: Mapping[str, Tensor], *, pruned: bool) -> None:
    """That a model, the student and the teacher alike, gives what is compared inside of it. inputs: without targets;
    pruned: the student is. Raises ModelError."""
    check_asked(config, model)
    if config.relations:
        projections(model, inputs)
    wanted = asked(config)
    with torch.no_grad():
        outputs = model(**inputs, **wanted) if wanted else {}
    if config.attention:
        _layers(outputs, outputs, "attentions", (None, None))
    states = _layers(outputs, outputs, "hidden_states", (None, None)) if config.hidden else []
    if pruned and any(layer[0].dim() != 3 for layer in states):
        raise ModelError(
            "distill.hidden: pruning cuts the channels that are compared, and such states are no tokens, whose cosines"
            " could be compared instead; set hidden: 0."
        )


_PARTS = (("", 0, 0), ("encoder_", 0, 0), ("decoder_", 1, 1), ("cross_", 1, 0))
"""what a model calls its layers' outputs: of an encoder-decoder those of both; and which of the two masks, of the
inputs and of the targets, their tokens have, and those that they attend to"""


def _layers(
    student: Mapping[str, Any], teacher: Mapping[str, Any], what: str, masks: tuple[Tensor | None, Tensor | None]
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Of each layer the student's and the teacher's, and the masks of tokens and of what they attend to; a deeper
    teacher is sampled evenly. what: "hidden_states" or "attentions". Raises ModelError where either gives none."""
    found: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
    for part, rows, columns in _PARTS:
        ours, theirs = (_given(outputs, part + what) for outputs in (student, teacher))
        found += [(s, t, masks[rows], masks[columns]) for s, t in _aligned(ours, theirs)] if ours and theirs else []
    if found:
        return found
    if what == "attentions":
        raise ModelError("distill.attention needs attention maps: set model.attn: eager (sdpa does not return them).")
    raise ModelError(
        "distill.hidden: the student or the teacher returns no hidden states of its layers; set hidden: 0."
    )


def _given(outputs: Mapping[str, Any], name: str) -> Sequence[Tensor]:
    """Nothing where a layer has none: sdpa gives no maps."""
    values = outputs.get(name) or ()
    return () if any(value is None for value in values) else values


def _target_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Where the decoder of an encoder-decoder reads tokens, [batch, length]."""
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"]
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        return inputs.get("attention_mask")  # a classifier's decoder reads what its encoder does
    return (labels != IGNORED).long()


def _states(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of hidden states [batch, length, width]; of their similarities, where the widths differ."""
    s, t = student.float(), teacher.float()
    if s.shape == t.shape:
        return _mean((s - t).pow(2).mean(-1), mask)
    if s.shape[:-1] != t.shape[:-1] or s.dim() != 3:
        tokens = (
            "Use a teacher that reads as many tokens" if s.dim() == 3 else "States that are no tokens need one width"
        )
        raise ModelError(
            f"distill.hidden: hidden states of the student have shape {tuple(s.shape)}, the teacher's"
            f" {tuple(t.shape)}. {tokens}, or set hidden: 0."
        )
    return _pairs((_similarities(s) - _similarities(t)).pow(2), mask, mask)


def _similarities(states: Tensor) -> Tensor:
    """Cosines [batch, length, length] between the tokens of a text."""
    unit = F.normalize(states, dim=-1)
    return unit @ unit.transpose(-1, -2)


def _maps(student: Tensor, teacher: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Mean squared error of attention maps [batch, heads, query, key] averaged over heads."""
    return _pairs((student.float().mean(1) - teacher.float().mean(1)).pow(2), rows, columns)


def _pairs(value: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The mean of [batch, length, length] over pairs of tokens that are no padding."""
    if rows is None or columns is None or rows.dim() != 2 or columns.dim() != 2:
        return value.mean()
    return _mean(value, rows[:, :, None] * columns[:, None, :])


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    """Over what counts; over all of what a mask does not fit, such as the patches of a picture."""
    if mask is None or mask.shape != value.shape:
        return value.mean()
    return (value * mask).sum() / mask.sum()


def _aligned(student: Sequence[Any], teacher: Sequence[Any]) -> list[tuple[Any, Any]]:
    last_s, last_t = len(student) - 1, len(teacher) - 1
    return [(s, teacher[round(i * last_t / last_s) if last_s else last_t]) for i, s in enumerate(student)]
