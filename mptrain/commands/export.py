"""`mptrain export`: one model to one format, compressed if asked, run again and compared before it is called done."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mptrain.commands.compressions import ABSENT, WORDS, Asked, check_stored, compress_first, stage_of
from mptrain.core.disk import check_writable, whole
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.pins import warn_untested
from mptrain.core.progress import progress
from mptrain.core.signature import BATCH, Batch, probed, rows_of
from mptrain.data.load import task_class
from mptrain.export.base import Embeddings, Runner, Source
from mptrain.export.facts import Facts
from mptrain.export.formats import format_of
from mptrain.export.torch import heads
from mptrain.export.torch.cached_decoder import check_decoder, check_length, padded_right
from mptrain.measure.memory import give_back
from mptrain.models.artifact import QUANTIZERS
from mptrain.models.load import load_model
from mptrain.models.samples import Loaded, load_with_inputs, tokens_read
from mptrain.models.saved_class import code_of
from mptrain.recipe import EXPORTS, Export, ExportSpec, Stage
from mptrain.recipe.exports import spec_of
from mptrain.recipe.exports.heads import misfit
from mptrain.recipe.tasks import causal
from mptrain.report.render.export_card import export_card
from mptrain.report.upgrade import about
from mptrain.verify import overflow, parity

SCHEMA = "mptrain.export/v1"
UNSAID = Asked()
CALIBRATION = 128
"""inputs to compress with"""


def export_model(
    path: str,
    to: Path,
    *,
    format: str = "openvino",
    precision: str = "fp32",
    options: dict[str, Any] | None = None,
    task: str | None = None,
    attn: str | None = None,
    data: str | None = None,
    samples: int = 32,
    calibration: int = CALIBRATION,
    length: int = 128,
    asked: Asked = UNSAID,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Write the folder `to` and return facts as JSON values.

    path: a model folder (also a pruned or quantized one), packaged:NAME or a hub name. precision: one of the format's,
    or a word of compressions.WORDS, which compresses the model first; asked: how. options: further fields of a
    recipe's `export` entry of that format. data: as for `mptrain inspect`; the inputs that the exported model
    is compared on, and others to calibrate on. samples: inputs to compare on. calibration: inputs to compress with;
    a search for what has to stay in fp32 takes as many as are compared.
    Returns {"schema", "model", "task", "about_task", "format", "precision", "path", "size_bytes", "fp32_bytes",
    "inputs", "parity", "compressed", "judged_by", "limit", "runtime", "passed", "seconds"}; compressed: None, or how
    and what it changed against the model as it was; passed: judged_by ("parity" or "agreement", which counts where
    numbers are rounded) is within the default gate. Raises UserError, ExportError.
    """
    begun = time.monotonic()
    calibrated = (Path(path) / QUANTIZERS).is_file()  # with ranges of its own, and exported as it is
    wanted = wanted_of(to, format, precision, options or {}, asked, data=data is not None or calibrated)
    limit = min(length, wanted.spec.cache or length)
    others = calibration if wanted.stage is not None and data is not None else samples
    found = load_with_inputs(path, task, attn, data, samples + others, limit, allow_code)

    def before() -> nn.Module:
        assert found.spec is not None
        return load_model(found.spec, None, seed=0, allow_code=allow_code)

    facts = export_loaded(found, wanted, samples=samples, length=limit, before=before, name=path)
    return facts | {"seconds": round(time.monotonic() - begun, 1)}


@dataclass(frozen=True)
class Wanted:
    """What is asked of an export. precision: the word of it. spec: with one precision. stage: compresses first.
    expanded: what to say of weights that the format writes out in full."""

    to: Path
    format: str
    precision: str
    spec: ExportSpec
    stage: Stage | None
    expanded: str | None


def wanted_of(
    to: Path, format: str, precision: str, options: dict[str, Any], asked: Asked = UNSAID, *, data: bool
) -> Wanted:
    """Checked as far as it can be without the model. data: whether there are inputs to calibrate on. Raises
    UserError."""
    if precision in ABSENT:
        raise UserError(f"--precision {precision}: {ABSENT[precision]}")
    if to.exists():
        raise UserError(f"--to {to}: exists already; choose another folder or remove it.")
    check_writable(to)
    stage = stage_of(precision, asked, data=data) if precision in WORDS else None
    if stage is None and asked.options:
        raise UserError(f"{asked.options[0]}: says how to compress, which --precision {precision} does not")
    spec = _spec(format, precision, options, stage)
    return Wanted(to, format, precision, spec, stage, None if stage is None else check_stored(spec, stage))


def export_loaded(
    found: Loaded,
    wanted: Wanted,
    *,
    samples: int,
    length: int,
    before: Callable[[], nn.Module],
    name: str,
    calibration: list[Batch] | None = None,
) -> dict[str, Any]:
    """`export_model` of a model in memory; its weights change where it is compressed first.

    samples: inputs to compare on, the others calibrate. length: tokens that it reads at most. before: the model once
    more, as it was. name: of the model, for a reader. calibration: inputs that calibrate, where there are others.
    """
    spec, stage, to = wanted.spec, wanted.stage, wanted.to
    inputs = _Inputs(
        found.samples.batches if spec.cache is None else _for_cache(spec.cache, found), samples, calibration
    )
    if why := misfit(spec.heads, found.kind):
        raise UserError(f"--head: {why}")
    if found.kind.causal:
        heads.check_vocabulary(spec.heads, found.model.config)
    fp32_bytes = sum(p.numel() * p.element_size() for p in found.model.parameters())
    compressed = None
    if stage is not None and not is_quantized(found.model):
        with progress(f"compress {wanted.precision}"):
            found, compressed = compress_first(found, stage, inputs.compared[0], inputs.calibration, length)
    source = _source(found, spec, inputs)
    kind = format_of(_sized(spec, found, source, length))
    config = getattr(source.model, "config", None)
    generation = getattr(source.model, "generation_config", None) if spec.cache is not None else None
    code = code_of(source.model, found.kind.head)
    with progress(f"export {to.name}"), whole(to, config, found.processor, generation, code) as scratch:
        written = kind.write(source, scratch)
        after = Facts(more={"heads": [head.words for head in spec.heads]} if spec.heads else {})
        source = replace(source, written=written.facts | after)
        earlier = None if compressed is None else before
        give_back()  # what converting took, before the written model is in memory beside this one
        with progress("verify"), closing(kind.open(written.path, source)) as runner:  # what cannot run is not kept
            alike = heads.agreement(task_class(found.kind), spec.heads)
            facts, difference, change = _compared(runner, source, inputs.compared, alike, earlier)
    model_path = to / written.path.relative_to(scratch)
    if compressed is not None:
        compressed |= {"expanded": wanted.expanded, "change": change}
    facts_json = {
        "schema": SCHEMA,
        "model": name,
        "task": found.kind.name,
        "about_task": about(found.kind),
        "format": wanted.format,
        "precision": source.precision,
        "compressed": compressed,
        "path": str(model_path),
        "size_bytes": written.size_bytes,
        "fp32_bytes": fp32_bytes,
        "inputs": found.samples.source,
        "max_length": length,
        "parity": difference,
        **parity.judged(difference, exact=facts.exact(source.precision)),
        "runtime": facts.as_json(),
    }
    (to / "README.md").write_text(export_card(facts_json), encoding="utf-8")
    return facts_json


def _sized(spec: ExportSpec, found: Loaded, source: Source, length: int) -> ExportSpec:
    """With the lengths that the written model reads, where it fixes them."""
    if found.kind.unit == "tokens":
        return spec.sized(tokens_read(found.model, length), True)
    lengths = _lengths(source)
    return spec.sized(max(lengths), not found.task) if lengths else spec


def _compared(
    runner: Runner,
    source: Source,
    batches: list[Batch],
    alike: parity.Agreement,
    before: Callable[[], nn.Module] | None,
) -> tuple[Facts, dict[str, Any], dict[str, Any] | None]:
    """What is known of an export, its difference from the model that was written, and from the one `before` that was
    compressed."""
    compare = partial(
        parity.compare,
        runner=runner,
        batches=batches,
        signature=source.signature,
        agreement=alike,
    )
    facts = runner.facts() | source.written
    difference = compare(source.model, exact=facts.exact(source.precision))
    return facts, difference, None if before is None else compare(before(), exact=False)


def _spec(format: str, precision: str, options: dict[str, Any], stage: Stage | None) -> ExportSpec:
    """An entry of a recipe's `export` with one precision, and its packages installed.

    stage: compresses first, and then the precision is the one that the format writes such models in. Raises UserError,
    ModuleNotFoundError.
    """
    if "cache" in options and spec_of(format).caches is None:
        able = " or ".join(name for name, kind in EXPORTS.items() if kind.caches is not None)
        raise UserError(
            f"--cache {options['cache']}: {spec_of(format).title} is written without a cache; drop it, or choose"
            f" --format {able}"
        )
    entry = {"id": "export", "format": format, "of": ["model"], **options}
    if stage is not None:
        bare: dict[str, Any] = {"cache": options.get("cache")}
        precision = spec_of(format).model_construct(**bare).usual(stage)
    entry["precision"] = [precision]
    try:
        spec: ExportSpec = TypeAdapter(Export).validate_python(entry)
    except ValidationError as error:
        said = "; ".join(_said(e["loc"], e["msg"]) for e in error.errors())
        raise UserError(f"export {format} {precision}: {said}") from None
    spec.check_installed()
    warn_untested(["torch", "transformers", *(package.name for package in spec.packages if package.needed)])
    return spec


class _Inputs:
    """`samples` of the inputs to compare on, and as many others to calibrate on, for a format that asks for them.

    Too few for both are shared out when they are asked for; a single batch has to do for both.
    """

    def __init__(self, batches: list[Batch], samples: int, others: list[Batch] | None = None) -> None:
        count = 0
        while count < len(batches) and sum(map(rows_of, batches[:count])) < samples:
            count += 1
        self.compared, self._others = batches[:count], batches[count:] if others is None else others

    def calibration(self) -> list[Batch]:
        if not self._others and len(self.compared) > 1:
            middle = (len(self.compared) + 1) // 2
            self.compared, self._others = self.compared[:middle], self.compared[middle:]
        return self._others or self.compared

    def searched(self, model: nn.Module, unit: str | None) -> list[Batch]:
        """Those of `calibration` that are enough to search fp16 on."""
        return overflow.some(self.calibration(), sum(p.numel() for p in model.parameters()), unit == "tokens")


def _lengths(source: Source) -> list[int]:
    """Of the example, along the free axes beside the batch."""
    ports = [
        (port.name, place) for port in source.signature.inputs for place, word in port.free.items() if word != BATCH
    ]
    return [source.example[name].shape[place] for name, place in ports]


def _source(found: Loaded, spec: ExportSpec, inputs: _Inputs) -> Source:
    (precision,) = spec.precision
    quantized = is_quantized(found.model)
    embeddings: Embeddings = "int8" if quantized else "fp32"
    model = format_of(spec).torch(found.model, precision, embeddings).eval()
    example = next((batch for batch in inputs.compared if rows_of(batch) > 1), inputs.compared[0])
    signature = heads.signature_with(probed(model, example), spec.heads, found.kind)
    searched = partial(inputs.searched, model, found.kind.unit)
    return Source(lambda: model, signature, example, precision, embeddings, quantized, searched)


def _said(where: tuple[int | str, ...], message: str) -> str:
    """where: of a pydantic error in an export entry: its format, and the field when it is of one."""
    field = "format" if not where else ".".join(map(str, where[1:]))
    return ": ".join(filter(None, [field, message.removeprefix("Value error, ")]))


def _for_cache(cache: int, found: Loaded) -> list[Batch]:
    """The inputs that a cached export is compared on. Raises UserError when it cannot be."""
    if not found.kind.causal:
        raise UserError(f"--cache {cache}: is for task {causal()}, not for {found.kind.name}; drop it")
    check_length("--cache", cache, found.model.config)
    check_decoder(found.model)
    batches = [{"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in found.samples.batches]
    longest = max(int(batch["attention_mask"].sum(1).max()) for batch in batches)
    if longest > cache:
        raise UserError(
            f"--cache {cache}: {found.samples.source} has texts of {longest} tokens; raise it, or give shorter texts"
        )
    return [padded_right(batch) for batch in batches]
