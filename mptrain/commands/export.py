"""`mptrain export`: one model to one format, run again and compared before it is called done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.progress import progress
from mptrain.core.signature import Batch
from mptrain.data.load import task_class
from mptrain.export.formats import Source, format_of
from mptrain.export.torch.cached_decoder import check_length, padded_right
from mptrain.models.samples import Loaded, load_with_inputs
from mptrain.recipe import EXPORTS, TASKS, Export, ExportSpec, Gates, Ptq, Stage
from mptrain.recipe.exports import spec_of
from mptrain.recipe.tasks import causal
from mptrain.report import gates
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
    is compared on. Returns {"schema", "model", "task", "format", "precision", "path", "size_bytes", "inputs",
    "parity", "judged_by", "limit", "runtime", "passed", "seconds"}; passed: judged_by ("parity" or "agreement", which
    counts where numbers are rounded) is within the default gate. Raises UserError, ExportError.
    """
    begun = time.monotonic()
    options = options or {}
    if "cache" in options and spec_of(format).caches is None:
        able = " or ".join(name for name, kind in EXPORTS.items() if kind.caches is not None)
        raise UserError(
            f"--cache {options['cache']}: {spec_of(format).title} is written without a cache; drop it, or choose"
            f" --format {able}"
        )
    if to.exists():
        raise UserError(f"--to {to}: exists already; choose another folder or remove it.")
    entry = {"id": "export", "format": format, "of": ["model"], "precision": [precision], **options}
    try:
        spec: ExportSpec = TypeAdapter(Export).validate_python(entry)
    except ValidationError as error:
        said = "; ".join(_said(e["loc"], e["msg"]) for e in error.errors())
        raise UserError(f"export {format} {precision}: {said}") from None
    spec.check_installed()
    cache = spec.cache
    found = load_with_inputs(path, task, attn, data, samples, min(length, cache or length), allow_code)
    kind = format_of(spec)
    quantize = Ptq(mode="ptq") if is_quantized(found.model) else None
    stage = Stage.model_construct(id="model", quantize=quantize)  # a finished model: nothing to train
    model = kind.model(found.model, precision, stage).eval()
    batches = found.samples.batches if cache is None else _for_cache(cache, found)
    example = next((b for b in batches if len(next(iter(b.values()))) > 1), batches[0])
    with progress(f"export {to.name}"):
        written = kind.write(
            model,
            example,
            to,
            precision=precision,
            stage=stage,
            calibration=lambda: batches,
            processor=found.processor,
        )
    runner = kind.runner(written.path, Source(lambda: model, example, precision, written.facts))
    with progress("verify"):
        compared = parity.compare(model, runner, batches, task_class(TASKS[found.task]).agreement)
    exact = gates.exact({"precision": precision, "runtime": written.facts})
    limit = Gates().parity if exact else Gates().agreement
    assert limit is not None
    return {
        "schema": SCHEMA,
        "model": path,
        "task": found.task,
        "format": format,
        "precision": precision,
        "path": str(written.path),
        "size_bytes": written.size_bytes,
        "inputs": found.samples.source,
        "parity": compared,
        "judged_by": "parity" if exact else "agreement",
        "runtime": kind.facts(runner) | written.facts,
        "passed": compared["max_abs_diff"] <= limit if exact else compared["agreement"] >= limit,
        "limit": limit,
        "seconds": round(time.monotonic() - begun, 1),
    }


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
