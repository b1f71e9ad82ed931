"""`mptrain verify` of what a runtime here executes: what the file holds, and whether it is the source model.

Everything is read from the file and from what the runtime made of it, nothing from what was asked for when it was
written. A Core ML package has no runtime here and goes through the interpreter (verify.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mptrain.core.disk import size
from mptrain.core.errors import UserError
from mptrain.core.signature import probed, rows_of
from mptrain.data.load import task_class
from mptrain.export.base import Source
from mptrain.export.formats import format_of
from mptrain.export.torch import heads as in_graph
from mptrain.models.samples import Loaded
from mptrain.recipe import EXPORTS, ExportSpec
from mptrain.recipe.exports.heads import Head, Heads, misfit
from mptrain.verify import parity

SCHEMA = "mptrain.verify-file/v1"
INTERPRETED = (".mlpackage",)
"""endings of what has no runtime here"""


def found_in(path: Path) -> tuple[Path, type[ExportSpec]]:
    """The exported model at a path, or the one in a folder, and its format. Raises UserError for none or several."""
    kinds = {spec.ending: spec for spec in EXPORTS.values() if spec.ending}
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.suffix in kinds:
        return path, kinds[path.suffix]
    inside = sorted(file for file in path.iterdir() if file.suffix in kinds) if path.is_dir() else []
    if len(inside) != 1:
        held = f"holds {', '.join(file.name for file in inside)}; name one" if inside else "is none"
        raise UserError(f"{path}: give an exported model ({', '.join(kinds)}) or a folder with one; this {held}")
    return inside[0], kinds[inside[0].suffix]


def verify_file(
    path: Path, spec: type[ExportSpec], source: Loaded | None = None, heads: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Facts as JSON values.

    heads: items of a recipe's, that the file computes after the source.
    source: the model that it was made from, with inputs, on which both are run. "parity" is then as of
    `verify.parity.compare`, judged as an export is ("judged_by", "limit"); without, "passed" says that the file is
    whole and the runtime takes it. Raises UserError for heads that are none or not of the source's task, ExportError
    for a file that the runtime refuses, or of which outputs are missing, of another shape or not finite.
    """
    spec.check_installed()
    bare: dict[str, Any] = {"format": spec.name()}
    kind = format_of(spec.model_construct(**bare))
    after = [] if source is None else _heads(heads, source)
    with closing(kind.open(path, _source(source, after))) as runner:
        facts = runner.facts()
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "path": str(path),
            "format": spec.name(),
            "size_bytes": _bytes(path),
            "runtime": facts.as_json(),
            "parity": None,
            "passed": True,
        }
        if source is None:
            return found
        agreement = in_graph.agreement(task_class(source.kind), after)
        floats = {"f32", "float", "Float32"}
        exact = set(facts.weight_types or ()) <= floats and facts.inference_precision in ("f32", None)
        difference = parity.compare(
            source.model,
            runner,
            source.samples.batches,
            signature=_source(source, after).signature,
            agreement=agreement,
            exact=exact,
        )
    return found | {
        "parity": difference,
        "inputs": source.samples.source,
        **parity.judged(difference, exact=exact),
    }


def _bytes(path: Path) -> int:
    """Of a package, or of a file and those beside it that hold its weights."""
    return size(path) if path.is_dir() else sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


def _heads(items: Sequence[Mapping[str, Any]], source: Loaded) -> list[Head]:
    try:
        heads = TypeAdapter(Heads).validate_python(list(items))
    except ValidationError as error:
        raise UserError(f"--head: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if why := misfit(heads, source.kind):
        raise UserError(f"--head: {why}")
    return heads


def _source(found: Loaded | None, heads: Sequence[Head] = ()) -> Source:
    """What a format may ask of a source where it opens a file."""
    if found is None:
        return Source(_no_model, None, {}, "fp32", "fp32", False, list)  # type: ignore[arg-type]
    model = found.model.eval()
    example = next((batch for batch in found.samples.batches if rows_of(batch) > 1), found.samples.batches[0])
    signature = in_graph.signature_with(probed(model, example), heads, found.kind)
    return Source(lambda: model, signature, example, "fp32", "fp32", False, list)


def _no_model() -> Any:
    raise UserError("this file can only be opened beside its source; give --model")
