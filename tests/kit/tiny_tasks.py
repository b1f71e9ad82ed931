"""A tiny model and learnable data for every task, and the recipe that runs JPQD on them.

Each maker writes model and data below a folder and returns the `model:` and `data:` of a recipe.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import one_hot

from mptrain.data.sources import cnn

FILLERS = "film plot cast the a is was very not so".split()
GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
NAMES, PLACES = ["anna", "bob", "eve", "carl"], ["rome", "paris", "york", "oslo"]
WORDS = [*FILLERS, *GOOD, *BAD, *NAMES, *PLACES, "new", "who", "where", "saw", "in", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RATE = 8000
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}
TEXT = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}


@dataclass(frozen=True)
class Case:
    """What a task's run must report: metrics, the main one first; examples in the test split; a score beyond chance.

    perfect: (the task, a batch with its targets) to the outputs of a model that makes no error.
    """

    make: Callable[[Path], dict[str, Any]]
    metrics: tuple[str, ...]
    n: int
    learnt: float
    perfect: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
    precision: tuple[str, ...] = ("fp32", "int8", "int8_emb4")
    length: int = 16
    epochs: float = 6
    lr: float = 3e-3
    own: bool = False
    """its model is code of one's own, not one of transformers"""


def recipe(task: str, folder: Path) -> dict[str, Any]:
    """The JPQD recipe of a task, as a mapping."""
    case = CASES[task]
    made = case.make(folder)
    return {
        "schema": "mptrain/v1",
        "name": task,
        "seed": 1,
        "model": {"path": str(folder / "model"), "task": task, **made["model"]},
        "data": {"calibration": {"samples": 32, "batch_size": 8}, **made["data"]},
        "stages": [
            {"id": "dense", "train": {"epochs": case.epochs, "lr": case.lr, "batch_size": 8}},
            {
                "id": "jpqd",
                "teacher": "dense",
                "train": {"epochs": 2, "lr": case.lr / 3, "batch_size": 8},
                "prune": {"method": "fisher", "keep": {"encoder_params": 0.6}, "schedule": {"end": 1}},
                "quantize": {"mode": "qat"},
                "distill": {"weight": 0.5},
            },
        ],
        "export": [{"id": "ov", "format": "openvino", "of": ["dense", "jpqd"], "precision": list(case.precision)}],
        "evaluate": {"latency": {"batch": [1], "length": [case.length], "threads": [1], "runs": 5}},
        "output": {"dir": str(folder / "run")},
    }


def text_pair(folder: Path) -> dict[str, Any]:
    """Two texts, each of one mood; the label says whether both praise, both damn, or they differ."""
    draw = random.Random(0)
    rows = []
    for _ in range(160):
        moods = draw.choice([(GOOD, GOOD), (BAD, BAD), (GOOD, BAD), (BAD, GOOD)])
        first, second = (_shuffled(draw, [draw.choice(m) for _ in range(2)], draw.randint(1, 5)) for m in moods)
        label = "mixed" if moods[0] is not moods[1] else "both" if moods[0] is GOOD else "neither"
        rows.append({"premise": " ".join(first), "hypothesis": " ".join(second), "label": label})
    _save(folder, t.RobertaForSequenceClassification(t.RobertaConfig(**ENCODER, **TEXT, type_vocab_size=1)))
    _tokenizer(["input_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, text="premise", text_pair="hypothesis", max_length=24)


def tagging(folder: Path) -> dict[str, Any]:
    """Names and places among other words; "new" belongs to a place only before "york"."""
    draw = random.Random(0)
    rows = []
    for _ in range(140):
        parts = [([w], ["O"]) for w in draw.choices([*FILLERS, "new"], k=draw.randint(2, 6))]
        parts.append(([draw.choice(NAMES)], ["B-PER"]))
        place = draw.choice(PLACES)
        parts.append((["new", "york"], ["B-LOC", "I-LOC"]) if place == "york" else ([place], ["B-LOC"]))
        draw.shuffle(parts)
        rows.append({"tokens": [w for p, _ in parts for w in p], "tags": [tag for _, p in parts for tag in p]})
    config = t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, initializer_range=0.1, **TEXT)
    _save(folder, t.DistilBertForTokenClassification(config))
    _tokenizer(["input_ids", "attention_mask"]).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16)


def questions(folder: Path) -> dict[str, Any]:
    """A context with one name and one place; the question "who" or "where" asks for one of them."""
    draw = random.Random(0)
    rows = []
    for number in range(160):
        name, place = draw.choice(NAMES), draw.choice(PLACES)
        context = " ".join(_shuffled(draw, [name, place], draw.randint(4, 9)))
        asked, answer = (("who", name), ("where", place))[number % 2]
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"question": f"{asked} is", "context": context, "answers": answers})
    _save(folder, t.BertForQuestionAnswering(t.BertConfig(**ENCODER, **TEXT)))
    _tokenizer(["input_ids", "token_type_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=24, stride=4)


def rewriting(folder: Path) -> dict[str, Any]:
    """Of a text the name and the place, in this order, whatever stands between them."""
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        name, place = draw.choice(NAMES), draw.choice(PLACES)
        rows.append({"text": " ".join(_shuffled(draw, [name, place], draw.randint(1, 4))), "target": f"{name} {place}"})
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.1, "max_position_embeddings": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"vocab_size": TEXT["vocab_size"], "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = t.BartConfig(**sizes, **tokens, decoder_start_token_id=3, forced_eos_token_id=3)
    _save(folder, t.BartForConditionalGeneration(config))
    _tokenizer(["input_ids", "attention_mask"]).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16)


def images(folder: Path) -> dict[str, Any]:
    """Noise with a bright square in one of three corners."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        corners = {"left": (0, 0), "right": (0, 8), "below": (8, 0)}
        for number in range(120):
            label = list(corners)[number % 3]
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            row, column = corners[label]
            pixels[row : row + 8, column : column + 8] += 100
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            writer.writerow([f"images/{number}.png", label])
    _save(folder, t.ViTForImageClassification(t.ViTConfig(**ENCODER, image_size=16, patch_size=4)))
    t.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    return {"model": {}, "data": {"train": str(folder / "data.csv"), "split": SPLIT}}


def places(folder: Path) -> dict[str, Any]:
    """The same pictures, and a network of one's own that describes them."""
    made = images(folder)
    shutil.copy(cnn.__file__, folder / "net.py")
    own = {"module": f"{folder / 'net.py'}:descriptors", "arguments": {"width": 4, "size": 8}}
    return made | {"model": {"path": "", "picture": {"size": 16}, **own}}


def sounds(folder: Path) -> dict[str, Any]:
    """Noisy tones of different length, low or high."""
    draw = np.random.default_rng(0)
    (folder / "sounds").mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "label"])
        for number in range(120):
            label, pitch = (("low", 300), ("high", 1500))[number % 2]
            time = np.arange(draw.integers(500, 800)) / RATE
            wave = np.sin(2 * np.pi * (pitch * draw.uniform(0.9, 1.1) * time + draw.random()))
            wave = 0.4 * wave + 0.1 * draw.standard_normal(len(time))
            wavfile.write(folder / "sounds" / f"{number}.wav", RATE, (wave * 20000).astype(np.int16))
            writer.writerow([f"sounds/{number}.wav", label])
    config = t.Wav2Vec2Config(
        **ENCODER,
        vocab_size=20,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        classifier_proj_size=16,
    )
    _save(folder, t.Wav2Vec2ForSequenceClassification(config))
    t.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder / "model")
    return {"model": {}, "data": {"train": str(folder / "data.csv"), "split": SPLIT, "max_length": 800}}


def language(folder: Path) -> dict[str, Any]:
    """Sentences of a small grammar: half of their words follow from the ones before."""
    draw = random.Random(0)
    rows = [
        {"text": f"{draw.choice(NAMES)} saw the {noun} in {draw.choice(PLACES)} . {noun} was very {mood} ."}
        for noun, mood in (draw.choice([("film", "good"), ("cast", "bad"), ("plot", "fine")]) for _ in range(240))
    ]
    config = t.LlamaConfig(**ENCODER, **TEXT, num_key_value_heads=2, bos_token_id=2, eos_token_id=3)
    _save(folder, t.LlamaForCausalLM(config))
    _tokenizer(["input_ids", "attention_mask"]).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=24, stride=12)


def ratings(folder: Path) -> dict[str, Any]:
    """The number is how many more words praise than damn."""
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        good, bad = draw.randint(0, 3), draw.randint(0, 3)
        words = _shuffled(draw, [*draw.choices(GOOD, k=good), *draw.choices(BAD, k=bad)], draw.randint(1, 4))
        rows.append({"text": " ".join(words), "label": f"{(good - bad) / 2}"})
    _save(folder, t.BertForSequenceClassification(t.BertConfig(**ENCODER, **TEXT)))
    _tokenizer(["input_ids", "token_type_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16)


def clicks(folder: Path) -> dict[str, Any]:
    """Who praises is offered what; it is clicked with a probability that grows with the words of praise."""
    draw = random.Random(0)
    rows = []
    for _ in range(480):
        good, bad = draw.randint(0, 3), draw.randint(0, 3)
        words = _shuffled(draw, [*draw.choices(GOOD, k=good), *draw.choices(BAD, k=bad)], draw.randint(1, 4))
        clicked = draw.random() < 1 / (1 + math.exp(-3 * (good - bad)))
        rows.append({"text": " ".join(words), "label": int(clicked)})
    _save(folder, t.BertForSequenceClassification(t.BertConfig(**ENCODER, **TEXT)))
    _tokenizer(["input_ids", "token_type_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16)


def topics(folder: Path) -> dict[str, Any]:
    """A text has the labels praise, blame, person and place, of which it holds a word."""
    draw = random.Random(0)
    kinds = {"praise": GOOD, "blame": BAD, "person": NAMES, "place": PLACES}
    rows = []
    for _ in range(240):
        chosen = draw.sample(sorted(kinds), draw.randint(1, 3))
        words = _shuffled(draw, [draw.choice(kinds[kind]) for kind in chosen], draw.randint(1, 5))
        rows.append({"text": " ".join(words), "label": "|".join(chosen)})
    _save(folder, t.BertForSequenceClassification(t.BertConfig(**ENCODER, **TEXT)))
    _tokenizer(["input_ids", "token_type_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16)


def topical(folder: Path) -> dict[str, Any]:
    """Texts belong together that hold the same name and the same place, among other words."""
    draw = random.Random(0)
    rows = []
    for number in range(280):
        name, place = NAMES[number % 4], PLACES[number // 4 % 4]
        words = _shuffled(draw, [name, place], draw.randint(2, 6))
        rows.append({"text": f"{' '.join(words)}", "label": f"{name} in {place}"})
    _save(folder, t.BertModel(t.BertConfig(**ENCODER, **TEXT)))
    _tokenizer(["input_ids", "token_type_ids", "attention_mask"], pair=True).save_pretrained(folder / "model")
    return _files(folder, rows, max_length=16, label="label")


SPLIT = {"validation": 0.15, "test": 0.25}


def _classes(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": 30.0 * one_hot(batch["labels"].clamp(min=0), len(data.labels)).float()}


def _numbers(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": batch["labels"][:, None]}


def _sign(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": 30.0 * (2 * batch["labels"].float()[:, None] - 1)}


def _signs(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": 30.0 * (2 * batch["labels"] - 1)}


def _places(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every group at a corner of its own."""
    corners = one_hot(batch["labels"], 20).float()[:, None]
    return {"last_hidden_state": corners.expand(-1, batch["input_ids"].shape[1], -1)}


def _groups(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every group at a corner of its own."""
    (port,) = data.outputs()
    return {port.name: one_hot(batch["labels"], 20).float()}


def _spans(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    length = batch["input_ids"].shape[1]
    return {f"{end}_logits": 30.0 * one_hot(batch[f"{end}_positions"], length).float() for end in ("start", "end")}


def _next_tokens(data: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": 60.0 * one_hot(batch["input_ids"].roll(-1, 1), len(data.processor)).float()}


def _targets(task: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """At each place the token of the target, as far as the decoder has read, its end token beyond it."""
    places = batch["decoder_input_ids"].shape[1]
    labels = torch.full((len(batch["labels"]), places), task.end)
    given = batch["labels"][:, :places]
    labels[:, : given.shape[1]] = torch.where(given == -100, task.end, given)
    return {"logits": 40.0 * one_hot(labels, len(task.processor)).float()}


CASES = {
    "text-classification": Case(text_pair, ("accuracy", "loss"), 40, 0.6, _classes, epochs=12),
    "regression": Case(ratings, ("mae", "mse", "pearson", "spearman"), 50, 0.45, _numbers, epochs=12),
    "click-rate": Case(clicks, ("log_loss", "auc"), 120, 0.6, _sign, epochs=12),
    "multi-label-classification": Case(topics, ("micro_f1", "macro_f1", "map", "loss"), 60, 0.8, _signs, epochs=16),
    "embedding": Case(topical, ("ndcg@10", "mrr", "recall@1", "recall@5", "recall@10"), 69, 0.8, _places, epochs=12),
    "token-classification": Case(tagging, ("f1", "accuracy"), 35, 0.8, _classes),
    "question-answering": Case(questions, ("f1", "exact_match"), 40, 0.6, _spans, length=24, epochs=16, lr=5e-3),
    "image-classification": Case(images, ("accuracy", "loss"), 30, 0.6, _classes, precision=("fp32", "int8")),
    "image-embedding": Case(
        places, ("ndcg@10", "mrr", "recall@1", "recall@5", "recall@10"), 30, 0.5, _groups, own=True
    ),
    "audio-classification": Case(sounds, ("accuracy", "loss"), 30, 0.8, _classes, ("fp32", "int8"), length=800),
    "causal-lm": Case(language, ("loss", "perplexity"), 60, 1.6, _next_tokens),
    "seq2seq": Case(rewriting, ("rouge_l", "chrf", "exact_match", "loss"), 40, 0.6, _targets, epochs=20, lr=5e-3),
}


def _shuffled(draw: random.Random, words: Iterable[str], fillers: int) -> list[str]:
    mixed = [*words, *draw.choices(FILLERS, k=fillers)]
    draw.shuffle(mixed)
    return mixed


def _save(folder: Path, model: t.PreTrainedModel) -> None:
    """Weights drawn anew, so that they do not depend on what was made before."""
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(folder / "model")


def _files(folder: Path, rows: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": {}, "data": {"train": str(file), "split": SPLIT, **data}}


def _tokenizer(inputs: list[str], pair: bool = False) -> t.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if pair else None,
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=60,
        model_input_names=inputs,
    )
