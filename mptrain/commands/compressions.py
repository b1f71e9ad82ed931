"""`--precision int8` and its like: a compression in one word, for a model that comes without a recipe.

A word stands for settings of a method as a stage of a recipe has them; the code that runs is the recipe's. The word of
activations and weights needs data to calibrate on; blocks of integers are rounded to nearest without, and searched by
GPTQ with data, unless --method says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError

from mptrain.compress.base import Site, Tools
from mptrain.compress.methods import finalized, methods_of, prepared
from mptrain.compress.weights import records
from mptrain.core.errors import UserError
from mptrain.core.signature import Batch, rows_of
from mptrain.models.samples import Loaded
from mptrain.recipe import ExportSpec, Stage
from mptrain.recipe.file import parse


@dataclass(frozen=True)
class Word:
    """A field of a stage and what it holds. grouped: the setting that --group-size names. searched: with data."""

    field: str
    settings: dict[str, Any]
    grouped: str | None = None
    searched: tuple[tuple[str, Any], ...] = ()

    def given(self, data: bool) -> dict[str, Any]:
        """Its settings where there are inputs to calibrate on, or are none."""
        return {**self.settings, **dict(self.searched if data else ())}


WORDS = {
    "int8": Word("quantize", {"mode": "ptq"}),
    "int8-weights": Word(
        "quantize", {"mode": "weight_only", "method": "rtn", "bits": 8, "granularity": "channel"}, "block_size"
    ),
    "int4": Word(
        "quantize",
        {"mode": "weight_only", "method": "rtn", "bits": 4, "block_size": "auto"},
        "block_size",
        (("method", "gptq"),),
    ),
    **{
        f"palette{bits}": Word("palettize", {"method": "kmeans", "bits": bits}, "group_size")
        for bits in (1, 2, 3, 4, 6, 8)
    },
}


ABSENT = {
    "nf4": "16 levels spaced as a normal distribution; mptrain has no method that makes them yet. Take --precision"
    " int4, also 16 levels in blocks: with --data GPTQ searches them, --set symmetric=false gives each block a zero"
    " point",
}
"""words that people know from other tools: what they are, and what to take instead"""


@dataclass(frozen=True)
class Asked:
    """What the command line says of a compression. settings: "KEY=VALUE" as in a recipe's stage."""

    method: str | None = None
    group_size: int | None = None
    settings: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Those that are given, as they are typed."""
        named = {"--method": self.method, "--group-size": self.group_size, "--set": self.settings or None}
        return [name for name, value in named.items() if value is not None]


def stage_of(word: str, asked: Asked, *, data: bool) -> Stage:
    """The stage of a recipe that a word and options come to. data: whether there are real inputs.

    Raises UserError for an option or value that the word has no use for, and for one that needs data where none are.
    """
    known = WORDS[word]
    settings = known.given(data)
    if asked.method is not None:
        if "method" not in settings:
            raise UserError(f"--method {asked.method}: --precision {word} has one method only; drop it")
        settings["method"] = asked.method
    if asked.group_size is not None:
        if known.grouped is None:
            raise UserError(f"--group-size {asked.group_size}: --precision {word} has a scale to each row; drop it")
        settings |= {known.grouped: asked.group_size} | ({"granularity": "block"} if "granularity" in settings else {})
    for text in asked.settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}: write KEY=VALUE, a setting of {known.field}, e.g. symmetric=false")
        settings[key], _ = parse(value, f"--set {key}")
    try:
        stage = Stage.model_validate({"id": "export", known.field: settings})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'][-1:]))}: {e['msg']}" for e in error.errors())
        given = ", ".join(asked.options)
        raise UserError(f"--precision {word}{f' with {given}' if given else ''}: {said}") from None
    needs = {need for method in stage.methods for need in method.needs()}
    if "labels" in needs:
        raise UserError(f"--precision {word}: {stage.methods[0].words()} needs labelled data, which a recipe has")
    if needs and not data:
        raise UserError(
            f"--precision {word}: {stage.methods[0].words()} calibrates on real inputs; give --data FILE, texts or a"
            " recipe whose `data:` is used"
            + (", or --method rtn, which needs none" if "method" in known.settings else "")
        )
    return stage


def check_stored(spec: ExportSpec, stage: Stage) -> str | None:
    """Raises UserError for weights that a format refuses. Returns what to say of those it writes out in full."""
    for _, weights in stage.leaves():
        stored = spec.stores(weights)
        if stored.result == "refused":
            raise UserError(f"--format {spec.format}: {stored.how}")
        if stored.result == "expanded":
            return f"{spec.title} keeps the values and not the size: {stored.how}"
    return None


def compress_first(
    found: Loaded,
    stage: Stage,
    example: Batch,
    calibration: Callable[[], list[Batch]],
    length: int,
) -> tuple[Loaded, dict[str, Any]]:
    """The model as the stage leaves it, and facts.

    {"how" (words), "stored" (what came of it), "methods" (facts by field), "calibrated_on" (inputs)}. Raises UserError
    for a model that is compressed already, and as the methods do.
    """
    if records.of(found.model):
        raise UserError("--precision: the weights of this model are compressed already; say how to compute, e.g. fp32")
    methods = methods_of(stage.methods)
    for method in methods:
        method.check(method.config, found.model, Site("--precision", example=example))
    batches = calibration() if any(method.needs() for method in stage.methods) else []
    tools = Tools(inputs=lambda: batches, example=lambda: example, length=length)
    model = finalized(methods, prepared(methods, found.model, tools), tools)
    did = {method.config.field: method.facts() for method in methods}
    facts = {
        "how": stage.methods[0].words(),
        "stored": _stored_as(did),
        "methods": did,
        "calibrated_on": sum(map(rows_of, batches)),
    }
    return replace(found, model=cast(Any, model).eval()), facts


def _stored_as(did: dict[str, Any]) -> str:
    """ "4 bits in blocks of 64: 24 weights, 8 bits in blocks of 128: 1 weight"; empty for fake quantizers."""
    rows = [row for facts in did.values() for row in facts.get("compressed", [])]
    alike = Counter(f"{row['bits']:g} bits, {row['how']}" for row in rows)
    return "; ".join(f"{how}: {count} weight{'s' * (count > 1)}" for how, count in alike.most_common())
