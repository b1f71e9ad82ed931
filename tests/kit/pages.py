"""Code on the pages: found by parsing the Markdown, and run as a reader would, in a folder with tiny inputs.

A fenced block says by its language what happens to it:

    sh       each command is run, but `mptrain recipe` does what it does before training: the checks of preflight;
             `make` and `pip` are looked up, what `accelerate` would start is checked
    python   all of a page run in order, in one namespace
    yaml     a recipe, or fields of one, which is validated
    json     parsed
    text     what nobody types: output, a tree, a drawing, a synopsis

A line `NAME.py`: before a block names a file, which is written first. An HTML comment directly before a block changes
this: `<!-- not run: WHY -->`, and `<!-- long: WHY -->` for what only the long tests run, and then wholly.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from tokenizers.models import WordPiece
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import mptrain
from kit import tiny, tiny_models
from mptrain import cli
from mptrain.commands.sweep import points
from mptrain.compress.quantize import quantizers
from mptrain.core.errors import RecipeError
from mptrain.flow import preflight
from mptrain.recipe import Qat, file

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
RUNS = ("jpqd-bert", "quickstart")
"""folders of runs that pages read from"""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    name: str | None
    """of the file that it is"""
    mark: str | None
    """"not run" or "long" """
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for a fence that is not closed."""
    found, before, begun = [], "", None
    lines: list[str] = []
    where = page.relative_to(ROOT).as_posix()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if begun is not None:
            if line == "```":
                named = re.fullmatch(r"`([\w.]+\.\w+)`:", before)
                marked = re.fullmatch(r"<!-- (not run|long): (.+) -->", before)
                mark, reason = (marked[1], marked[2]) if marked else (None, "")
                text = "\n".join(lines) + "\n"
                found.append(Block(where, *begun, text, named[1] if named else None, mark, reason))
                begun, before = None, ""
            else:
                lines.append(line)
        elif line.startswith("```"):
            begun, lines = (number, line[3:]), []
        elif line:
            before = line
    if begun is not None:
        raise ValueError(f"{where}:{begun[0]}: the fence is not closed")
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def furnish(folder: Path) -> Path:
    """A reader's folder: a model, a table, and what a run has left."""
    folder.mkdir()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tiny.SPECIAL) + len(tiny.WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            id2label={0: "fresh", 1: "rotten"},
            label2id={"fresh": 0, "rotten": 1},
        )
    )
    tokenizer = tiny.tokenizer(WordPiece)  # the main job cuts rare tokens
    tokenizer.model_max_length = 512
    model.save_pretrained(folder / "my-bert")
    tokenizer.save_pretrained(folder / "my-bert")
    tiny.save_reviews(folder / "my.csv", rows=160)
    tiny_models.tiny("opt", vocab_size=2048).save_pretrained(folder / "my-opt")
    tokenizer.save_pretrained(folder / "my-opt")
    (folder / "nncf.json").write_text('{"compression": {"algorithm": "quantization", "preset": "mixed"}}')
    shutil.copytree(ROOT / "configs", folder / "configs")
    given = namespace(folder)
    small = quantizers.quantize(given["model"], Qat(mode="qat"), given["batches"])
    for name in RUNS:
        run = folder / "runs" / name
        mptrain.save(small, run / "stages" / "jpqd" / "1-finetune" / "model", tokenizer)
        shutil.copy(ROOT / "benchmarks/results/runs/jpqd-bert.json", run / "report.json")
    exported = folder / "runs" / RUNS[0] / "export" / "jpqd_int8"
    source = str(folder / "runs" / RUNS[0] / "stages" / "jpqd" / "1-finetune" / "model")
    assert cli.main(["export", source, "--precision", "int8", "--to", str(exported)]) == 0
    for name in RUNS[1:]:
        shutil.copytree(exported, folder / "runs" / name / "export" / "jpqd_int8")
    return folder


def namespace(folder: Path) -> dict[str, Any]:
    """The names that pages call yours."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "my-bert")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-bert")
    texts = [" ".join(tiny.WORDS[i % 6 :: 3]) for i in range(32)]
    encoded = [tokenizer(text, padding="max_length", max_length=16, truncation=True) for text in texts]
    rows = [{**{k: torch.tensor(v) for k, v in row.items()}, "labels": i % 2} for i, row in enumerate(encoded)]
    batches = [dict(tokenizer(texts[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 32, 8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {
        "model": model,
        "teacher": AutoModelForSequenceClassification.from_pretrained(folder / "my-bert"),
        "tokenizer": tokenizer,
        "data": rows,
        "batches": batches,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }


def run(block: Block, names: dict[str, Any], wholly: bool = False) -> None:
    """In the current folder. wholly: a block that is marked long, too, and all of what it says."""
    if block.name:
        Path(block.name).write_text(block.text, encoding="utf-8")
    if block.mark == "not run":
        return
    later = block.mark == "long" and not wholly
    wholly = wholly and block.mark == "long"
    if block.language == "sh":
        for words in commands(block.text):
            _command(words, block, wholly, later)
    elif later:
        return
    elif block.language == "python" and not block.name:
        exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)
    elif block.language == "yaml" and not (block.name and "schema:" not in block.text):
        validate(block.text)
    elif block.language == "json":
        json.loads(block.text)


def validate(text: str) -> None:
    """A whole recipe as it is, fields laid over recipes that they can be meant for. Raises RecipeError."""
    fields, _ = file.parse(text, "the page")
    if "schema" in fields:
        file.validate(fields, "the page")
        return
    refused = []
    for name in ("jpqd-bert", "int4-opt"):
        recipe, _ = file.parse(file.find(name).read_text(encoding="utf-8"), name)
        try:
            file.validate(recipe | fields, "the page")
            return
        except RecipeError as error:
            refused.append(str(error))
    raise RecipeError(refused[0])


def _command(words: list[str], block: Block, wholly: bool, later: bool) -> None:
    if words[0] == "mptrain" and words[1] == "recipe" and "--dry-run" not in words and not wholly:
        _check_recipe(words[1:])
    elif words[0] == "mptrain" and later:
        cli.parser().parse_args(words[1:])
    elif words[0] == "mptrain":
        # tiny models miss the gates of real ones: 3
        assert cli.main(words[1:]) in ((0, 3) if words[1] == "recipe" else (0,)), (str(block), words)
    elif words[0] == "accelerate":
        _launch(words[2:], wholly)
    elif words[0] == "make":
        rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in rules, (str(block), words)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = re.findall(r"\[([\w,]+)\]", words[2])
        assert {extra for names in named for extra in names.split(",")} <= set(extras["optional-dependencies"])
    elif words[0] == "python" and words[1] == "-m":
        assert find_spec(words[2]), (str(block), words)
    elif words[0] == "python" and later:
        assert Path(words[1]).is_file(), (str(block), words)
    elif words[0] == "python":
        argv, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = argv
    else:
        raise AssertionError(f"{block}: nothing here runs {words[0]!r}; see the top of {__file__}")


def _check_recipe(words: list[str]) -> None:
    options = cli.parser().parse_args(words)
    if options.sweep:
        recipes = [point.recipe for point in points(options.recipe, options.set, options.sweep)]
    else:
        recipes = [file.read(options.recipe, options.set).recipe]
    for recipe in recipes:
        preflight.check(recipe, allow_code=options.allow_code, offline=True)


def _launch(words: list[str], wholly: bool) -> None:
    """As accelerate reads it; what it starts is a dry run, or there."""
    found = launch_command_parser().parse_args(words)
    assert Path(found.config_file).is_file()
    if wholly:
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
    elif found.module:
        assert found.training_script == "mptrain"
        _check_recipe(found.training_script_args)
    else:
        assert Path(found.training_script).is_file()
