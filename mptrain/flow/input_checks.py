"""Whether the model, its tokenizer, its teachers and the data fit each other, found before anything is trained.

    sizes      tokens ≤ positions that the model holds; ids ≤ rows of its embedding
    padding    outputs of a row alone and in a padded batch agree: else scores depend on what a row is batched with,
               or the head reads a place that is padding
    teachers   one reads the ids that the student's tokenizer makes, so it must mean the same by them

`check_padding` runs the architecture, small and with random weights: what padding does to it no weight changes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptrain.core.errors import DataError, ModelError
from mptrain.data.load import Task
from mptrain.data.sources import packaged
from mptrain.data.tasks.text import tokenize
from mptrain.models.head import fit_head
from mptrain.models.load import read_config, skeleton
from mptrain.models.positions import positions_of, token_rows
from mptrain.models.probe import probe
from mptrain.models.processor import load_processor
from mptrain.recipe import Recipe, Stage

log = logging.getLogger(__name__)

AGREE = 1e-2
"""of the largest output: 22 architectures are below 4e-4 where their padding is right, and above 0.2 where it is not"""
_LONGEST = 512
_TEXTS = 64


def check(
    recipe: Recipe, data: Task, config: PreTrainedConfig, *, allow_code: bool = False, offline: bool = False
) -> None:
    """config: of the recipe's model. offline: teachers that are not on this machine are left out.

    Raises UserError and its kinds, naming the field.
    """
    if recipe.model.own_code or recipe.model.kind.head is None:
        return  # only its code knows how it is built
    if recipe.model.kind.processor == "tokenizer":
        check_sizes(skeleton(recipe.model, config, allow_code), data.processor, recipe.data.max_length)
        check_padding(recipe, data, config, allow_code)
    if recipe.model.kind.processor == "audio":
        _say_padding_of_sounds(recipe, data, config, allow_code)
    for stage in recipe.stages:
        path = _teacher(recipe, stage)
        if path is not None:
            _check_teacher(recipe, stage, path, data, allow_code, offline)


# -- sizes


def check_sizes(model: nn.Module, tokenizer: Any, tokens: int, field: str = "data.max_length", of: str = "") -> None:
    """Raise DataError for more tokens than the model reads, ModelError for more ids than it has embeddings of.

    tokens: the most that an input has, by `field`. of: whose model it is, for the message.
    """
    positions = positions_of(model)
    if positions is not None and tokens > positions.tokens:
        raise DataError(
            f"{field}: {tokens} is more than the {positions.tokens} tokens that the {of}model reads ({positions.why});"
            " lower it."
        )
    rows, ids = token_rows(model), tokenizer.get_vocab()
    if rows is not None and max(ids.values()) >= rows:
        first = min((token for token, number in ids.items() if number >= rows), key=ids.__getitem__)
        raise ModelError(
            f"model.path: the tokenizer has {max(ids.values()) + 1} tokens, the {of}model {rows} embeddings (first"
            f" without: {first!r}). Give the model's own tokenizer, or save the model again after"
            " model.resize_token_embeddings(len(tokenizer))."
        )


# -- padding


def check_padding(recipe: Recipe, data: Task, config: PreTrainedConfig, allow_code: bool = False) -> None:
    """Raise ModelError for a model whose outputs for a row change with the padding of its batch."""
    batch = _padded_batch(data)
    model = probe(recipe.model, config, allow_code) if batch is not None else None
    if model is None or batch is None:
        return
    names = [port.name for port in data.outputs()]
    kept = _kept(batch, data.processor.pad_token_id)
    used = padding_difference(model, batch, kept, names)
    if used <= AGREE:
        return
    side = "left" if bool((~kept[:, 0]).any()) else "right"
    other = {"left": "right", "right": "left"}[side]
    if padding_difference(model, *_padded_on(other, batch, kept), names) <= AGREE:
        fix = f'On the {other} they agree: write "padding_side": "{other}" in its tokenizer_config.json.'
    else:
        fix = "It takes no account of an attention mask, so a score would depend on the batch: choose another model."
    raise ModelError(
        f"model.path: the tokenizer of {recipe.model.path} pads on the {side}, and so padded the outputs of a"
        f" {type(model).__name__} differ from those without padding by {100 * used:.0f}% of the largest. {fix}"
    )


@torch.no_grad()
def padding_difference(model: nn.Module, batch: Mapping[str, Tensor], kept: Tensor, names: Sequence[str]) -> float:
    """Largest difference between the outputs of rows alone and in one batch, against the largest output.

    kept: bool [b, s], False where batch is padding. names: of the outputs that count.
    """
    together = _outputs(model, batch, names)
    worst = largest = 0.0
    for row, own in enumerate(kept):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        single = {name: value[:, own] if value.shape[1:] == own.shape else value for name, value in one.items()}
        for name, alone in _outputs(model, single, names).items():
            padded = together[name][row : row + 1]
            if alone.shape != padded.shape:  # one value to each token
                padded = padded[:, own]
            worst = max(worst, float((padded - alone).abs().max()))
            largest = max(largest, float(alone.abs().max()))
    return worst / largest if largest else 0.0


@torch.no_grad()
def _say_padding_of_sounds(recipe: Recipe, data: Task, config: PreTrainedConfig, allow_code: bool) -> None:
    """A warning for a model whose outputs for a sound change with the silence behind it.

    No error: some are trained so, without a mask (wav2vec2-base), and their processor asks for it.
    """
    order = sorted(range(len(data.train)), key=lambda i: (data.train.lengths[i], i))
    rows = [data.train[order[0]], data.train[order[-1]]]
    model = probe(recipe.model, config, allow_code) if data.train.lengths[order[0]] < max(data.train.lengths) else None
    if model is None:
        return
    names = [port.name for port in data.outputs()]
    together = _outputs(model, data.without_targets(data.collate(rows)), names)
    alone = _outputs(model, data.without_targets(data.collate(rows[:1])), names)
    for name, value in alone.items():
        differs = float((together[name][:1] - value).abs().max() / value.abs().max().clamp(min=1e-12))
        if differs > AGREE:
            log.warning(
                "model.path: the outputs of a %s for a sound change with the silence that pads it (by %.0f%% of the"
                " largest, random weights): its processor makes no attention mask. Scores depend on what a sound is"
                " batched with; evaluate.batch_size: 1 scores each alone.",
                type(model).__name__, 100 * differs,
            )  # fmt: skip


def _outputs(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    found = model(**batch)
    return {name: found[name].float() for name in names if name in found}


def _kept(batch: Mapping[str, Tensor], pad: int) -> Tensor:
    """Where tokens are; a model that takes no mask has nothing but the padding's id to tell."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else batch["input_ids"] != pad


def _padded_on(side: str, batch: Mapping[str, Tensor], kept: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The batch, and what is kept of it, with the padding of each row on `side`."""
    order = kept.long().argsort(dim=1, stable=True, descending=side == "right")
    turned = {n: value.gather(1, order) if value.shape == kept.shape else value for n, value in batch.items()}
    return turned, kept.gather(1, order)


def _padded_batch(data: Task) -> dict[str, Tensor] | None:
    """The shortest and the longest of the training examples up to _LONGEST tokens, and one between.

    None where all are of one length, so that nothing is ever padded.
    """
    order = sorted(range(len(data.train)), key=lambda i: (data.train.lengths[i], i))
    order = [i for i in order if data.train.lengths[i] <= _LONGEST] or order[:1]
    chosen = {data.train.lengths[i]: i for i in (order[0], order[len(order) // 2], order[-1])}
    if len(chosen) < 2:
        return None
    batch = data.without_targets(data.collate([data.train[i] for i in chosen.values()]))
    # a decoder reads its first token, which is no padding
    decoder = {name: value[:, :1] for name, value in batch.items() if name.startswith("decoder_")}
    same = {name: value for name, value in batch.items() if value.shape == batch["input_ids"].shape}
    return same | decoder


# -- teachers


def _teacher(recipe: Recipe, stage: Stage) -> str | None:
    """The path of a teacher that does not come from this recipe."""
    inside = {None, "self", "model", *(s.id for s in recipe.stages)}
    return None if stage.teacher in inside else stage.teacher


def _check_teacher(recipe: Recipe, stage: Stage, path: str, data: Task, allow_code: bool, offline: bool) -> None:
    field = f"stages.{stage.id}.teacher"
    spec = recipe.model.model_copy(update={"path": path, "modeling": None, "module": None})
    if offline and not _is_here(path):
        return
    config = read_config(spec, allow_code)
    model = skeleton(spec, config, allow_code)
    if data.labels is not None:
        fit_head(model, data.labels, (), new_head=False, problem=spec.kind.problem)
    if spec.kind.processor != "tokenizer":
        check_teacher_processor(data.processor, load_processor(spec, allow_code), spec.kind.processor, field)
        return
    check_teacher_ids(data.processor, load_processor(spec, allow_code), _texts(data), field)
    check_sizes(model, data.processor, recipe.data.max_length, of="teacher's ")
    _check_vocabulary(recipe, model, field, allow_code)


def _is_here(path: str) -> bool:
    if path.startswith(packaged.PREFIX):
        return packaged.cached(path) is not None
    return Path(path).expanduser().is_dir()


def check_teacher_ids(student: Any, teacher: Any, texts: list[str], field: str) -> None:
    """Raise ModelError for a tokenizer that gives other ids than the student's."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    other = sorted((token for token in ours if theirs.get(token) != ours[token]), key=ours.__getitem__)
    fix = "It reads the student's ids: give a teacher with the student's tokenizer, or fine-tune one from model.path."
    if other:
        there = theirs.get(other[0], "not there")
        raise ModelError(
            f"{field}: its tokenizer gives other ids than the student's: {len(other)} of {len(ours)} tokens differ"
            f" (first: {other[0]!r} is {ours[other[0]]}, in the teacher {there}). {fix}"
        )
    for text in (variant for given in texts for variant in (given, given.title())):
        one, two = (tokenize(tokenizer, text)["input_ids"] for tokenizer in (student, teacher))
        if one != two:
            raise ModelError(
                f"{field}: its tokenizer gives other ids than the student's for {text[:60]!r}: {two[:8]}, the student's"
                f" {one[:8]}. {fix}"
            )


def check_teacher_processor(student: Any, teacher: Any, kind: str | None, field: str) -> None:
    """Raise ModelError for an image processor or feature extractor that makes another input of the same picture or
    sound, for the teacher sees what the student's makes."""
    draw = np.random.default_rng(0)
    if kind == "image":
        picture = Image.fromarray(draw.integers(0, 255, (61, 47, 3), dtype=np.uint8))
        one, two = (p(images=picture, return_tensors="np") for p in (student, teacher))
    elif kind == "audio":
        if student.sampling_rate != teacher.sampling_rate:
            raise ModelError(
                f"{field}: it hears {teacher.sampling_rate} samples a second, the student {student.sampling_rate}; give"
                " a teacher of the same rate."
            )
        rate = student.sampling_rate
        wave = (0.3 * draw.standard_normal(rate)).astype(np.float32)
        one, two = (p([wave], sampling_rate=rate, padding=True, return_tensors="np") for p in (student, teacher))
    else:
        return
    for name in set(one) & set(two):
        ours, theirs = np.asarray(one[name]), np.asarray(two[name])
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, atol=1e-3):
            how = f"of shape {list(theirs.shape)} where the student's have {list(ours.shape)}"
            how = how if ours.shape != theirs.shape else f"that differ by up to {np.abs(ours - theirs).max():.2g}"
            raise ModelError(
                f"{field}: its processor makes {name} {how}. It sees what the student's processor makes: give a teacher"
                " with the same preprocessor_config.json, or fine-tune one from model.path."
            )
    if not set(one) & set(two):
        taken, made = ", ".join(sorted(two)), ", ".join(sorted(one))
        raise ModelError(f"{field}: it takes {taken}, the student {made}; give another.")


def _texts(data: Task) -> list[str]:
    batches = [batch["input_ids"] for batch in data.calibration(_TEXTS, 16)]
    return [data.processor.decode(ids, skip_special_tokens=True) for batch in batches for ids in batch]


def _check_vocabulary(recipe: Recipe, teacher: PreTrainedModel, field: str, allow_code: bool) -> None:
    """Logits over the vocabulary are compared one by one."""
    if not recipe.model.kind.causal:
        return
    student = skeleton(recipe.model, read_config(recipe.model, allow_code), allow_code)
    ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if ours != theirs:
        raise ModelError(f"{field}: it has logits for {theirs} tokens, the student for {ours}; give one with as many.")
