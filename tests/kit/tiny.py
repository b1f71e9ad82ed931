"""Tiny inputs for tests: a BERT with a word tokenizer and reviews that can be learnt in seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = "good bad fine poor great awful film plot cast the a is was very not so".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POSITIVE = {"good", "fine", "great"}
NEGATIVE = {"bad", "poor", "awful"}


def tokenizer(kind: Any = models.WordLevel) -> PreTrainedTokenizerFast:
    """kind: models.WordPiece gives one whose vocabulary can be cut, of the same tokens."""
    vocabulary = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(kind(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_bert(folder: Path, layers: int = 2, ffn: int = 64, **config: Any) -> Path:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=ffn,
            max_position_embeddings=64,
            **config,
        )
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_reviews(path: Path, rows: int = 240, seed: int = 0) -> Path:
    """Texts of random words; the label says whether there are more positive than negative ones."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "film"])
        written = 0
        seen = set()
        while written < rows:
            words = [draw.choice(WORDS) for _ in range(draw.randint(4, 14))]
            mood = sum(w in POSITIVE for w in words) - sum(w in NEGATIVE for w in words)
            text = " ".join(words)
            if mood and text not in seen:
                seen.add(text)
                writer.writerow([text, "fresh" if mood > 0 else "rotten", f"film {written % 12}"])
                written += 1
    return path


def jpqd(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small JPQD recipe on tiny inputs below `folder`, as a mapping."""
    if not (folder / "bert").is_dir():
        save_bert(folder / "bert")
        save_reviews(folder / "reviews.csv")
    recipe: dict[str, Any] = {
        "schema": "mptrain/v1",
        "name": "tiny",
        "seed": 1,
        "model": {"path": str(folder / "bert"), "task": "text-classification"},
        "data": {
            "train": str(folder / "reviews.csv"),
            "split": {"validation": 0.15, "test": 0.25},
            "max_length": 32,
            "calibration": {"samples": 32, "batch_size": 8},
        },
        "stages": [
            {"id": "dense", "train": {"epochs": 6, "lr": 3e-3, "batch_size": 8, "checkpoint_steps": 7}},
            {
                "id": "jpqd",
                "teacher": "dense",
                "train": {"epochs": 3, "lr": 2e-3, "batch_size": 8, "checkpoint_steps": 7},
                "prune": {"method": "fisher", "keep": {"encoder_params": 0.5}, "schedule": {"end": 1}},
                "quantize": {"mode": "qat", "start": "joint"},  # all methods act at once, and go through the cut
                "distill": {"weight": 0.5},
            },
        ],
        "export": [
            {"id": "ov", "format": "openvino", "of": ["dense", "jpqd"], "precision": ["fp32", "int8", "int8_emb4"]}
        ],
        "evaluate": {"latency": {"batch": [1], "length": [16], "threads": [1], "runs": 5}},
        "output": {"dir": str(folder / "run")},
    }
    return recipe | changes


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
