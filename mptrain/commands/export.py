"""`mptrain export`: one model to one format, run again and compared before it is called done."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mptrain.core.disk import whole
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.progress import progress
from mptrain.core.signature import BATCH, Batch, probed, rows_of
from mptrain.data.load import task_class
from mptrain.export.base import Embeddings, Source
from mptrain.export.formats import format_of
from mptrain.export.torch.cached_decoder import check_length, padded_right
from mptrain.models.samples import Loaded, load_with_inputs, tokens_read
from mptrain.recipe import EXPORTS, TASKS, Export, ExportSpec, Gates
from mptrain.recipe.exports import spec_of
from mptrain.recipe.tasks import causal
from mptrain.verify import parity

SCHEMA = "mptrain.export/v1"


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
    length: int = 128,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Write the folder `to` and return facts as JSON values.

    path: a model folder (also a pruned or quantized one), packaged:NAME or a hub name. options: further fields of a
    recipe's `export` entry of that format. data: as for `mptrain inspect`; the inputs that the exported model
    is compared on. samples: inputs to compare on; what has to calibrate does so on as many others.
    Returns {"schema", "model", "task", "format", "precision", "path", "size_bytes", "inputs",
    "parity", "judged_by", "limit", "runtime", "passed", "seconds"}; passed: judged_by ("parity" or "agreement", which
    counts where numbers are rounded) is within the default gate. Raises UserError, ExportError.
    """
    begun = time.monotonic()
    if to.exists():
        raise UserError(f"--to {to}: exists already; choose another folder or remove it.")
    spec = _spec(format, precision, options or {})
    cache = spec.cache
    limit = min(length, cache or length)
    found = load_with_inputs(path, task, attn, data, 2 * samples, limit, allow_code)
    inputs = _Inputs(found.samples.batches if cache is None else _for_cache(cache, found), samples)
    source = _source(found, spec, precision, inputs)
    if TASKS[found.task].unit == "tokens":
        spec = spec.sized(tokens_read(found.model, limit), True)
    elif lengths := _lengths(source):
        spec = spec.sized(max(lengths), False)
    kind = format_of(spec)
    config = getattr(source.model, "config", None)
    with progress(f"export {to.name}"), whole(to, config, found.processor) as scratch:
        written = kind.write(source, scratch)
    model_path = to / written.path.relative_to(scratch)
    with progress("verify"), closing(kind.open(model_path, replace(source, written=written.facts))) as runner:
        agreement = task_class(TASKS[found.task]).agreement
        difference = parity.compare(
            source.model, runner, inputs.compared, signature=source.signature, agreement=agreement
        )
        facts = runner.facts() | written.facts
    exact = facts.exact(precision)
    bound = Gates().parity if exact else Gates().agreement
    assert bound is not None
    return {
        "schema": SCHEMA,
        "model": path,
        "task": found.task,
        "format": format,
        "precision": precision,
        "path": str(model_path),
        "size_bytes": written.size_bytes,
        "inputs": found.samples.source,
        "parity": difference,
        "judged_by": "parity" if exact else "agreement",
        "runtime": facts.as_json(),
        "passed": difference["relative"] <= bound if exact else difference["agreement"] >= bound,
        "limit": bound,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _spec(format: str, precision: str, options: dict[str, Any]) -> ExportSpec:
    """An entry of a recipe's `export`, with its packages installed. Raises UserError, ModuleNotFoundError."""
    if "cache" in options and spec_of(format).caches is None:
        able = " or ".join(name for name, kind in EXPORTS.items() if kind.caches is not None)
        raise UserError(
            f"--cache {options['cache']}: {spec_of(format).title} is written without a cache; drop it, or choose"
            f" --format {able}"
        )
    entry = {"id": "export", "format": format, "of": ["model"], "precision": [precision], **options}
    try:
        spec: ExportSpec = TypeAdapter(Export).validate_python(entry)
    except ValidationError as error:
        said = "; ".join(_said(e["loc"], e["msg"]) for e in error.errors())
        raise UserError(f"export {format} {precision}: {said}") from None
    spec.check_installed()
    return spec


class _Inputs:
    """`samples` of the inputs to compare on, and as many others to calibrate on, for a format that asks for them.

    Too few for both are shared out when they are asked for; a single batch has to do for both.
    """

    def __init__(self, batches: list[Batch], samples: int) -> None:
        count = 0
        while count < len(batches) and sum(map(rows_of, batches[:count])) < samples:
            count += 1
        self.compared, self._others = batches[:count], batches[count:]

    def calibration(self) -> list[Batch]:
        if not self._others and len(self.compared) > 1:
            middle = (len(self.compared) + 1) // 2
            self.compared, self._others = self.compared[:middle], self.compared[middle:]
        return self._others or self.compared


def _lengths(source: Source) -> list[int]:
    """Of the example, along the free axes beside the batch."""
    ports = [
        (port.name, place) for port in source.signature.inputs for place, word in port.free.items() if word != BATCH
    ]
    return [source.example[name].shape[place] for name, place in ports]


def _source(found: Loaded, spec: ExportSpec, precision: str, inputs: _Inputs) -> Source:
    quantized = is_quantized(found.model)
    embeddings: Embeddings = "int8" if quantized else "fp32"
    model = format_of(spec).torch(found.model, precision, embeddings).eval()
    example = next((batch for batch in inputs.compared if rows_of(batch) > 1), inputs.compared[0])
    signature = probed(model, example)
    return Source(lambda: model, signature, example, precision, embeddings, quantized, inputs.calibration)


def _said(where: tuple[int | str, ...], message: str) -> str:
    """where: of a pydantic error in an export entry: its format, and the field when it is of one."""
    field = "format" if not where else ".".join(map(str, where[1:]))
    return ": ".join(filter(None, [field, message.removeprefix("Value error, ")]))


def _for_cache(cache: int, found: Loaded) -> list[Batch]:
    """The inputs that a cached export is compared on. Raises UserError when it cannot be."""
    if not TASKS[found.task].causal:
        raise UserError(f"--cache {cache}: is for task {causal()}, not for {found.task}; drop it")
    check_length("--cache", cache, found.model.config)
    longest = max(int(batch["attention_mask"].sum(1).max()) for batch in found.samples.batches)
    if longest > cache:
        raise UserError(
            f"--cache {cache}: {found.samples.source} has texts of {longest} tokens; raise it, or give shorter texts"
        )
    return [padded_right(batch) for batch in found.samples.batches]
