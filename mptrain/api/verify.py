"""`mptrain.verify`: what an exported file holds and does, and whether it is a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from mptrain.api.given import loaded, own_copy
from mptrain.api.shown import Shown
from mptrain.commands.verify_file import INTERPRETED, found_in, verify_file
from mptrain.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """facts: JSON values, what `mptrain verify --json` writes. passed: the file is whole, and, where a model was given,
    computes what it computes."""

    path: Path
    passed: bool
    facts: dict[str, Any]

    def _parts(self) -> Iterable[RenderableType]:
        from mptrain.report.render import verify
        from mptrain.report.render.terminal import draw

        if "package" in self.facts:
            yield verify.package(self.facts)
        else:
            yield draw(verify.found(self.facts))
            yield verify.file(self.facts)


def verify(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    data: Any = None,
    task: str | None = None,
    precision: Literal["fp32", "fp16"] | None = None,
    samples: int = 32,
    length: int = 128,
) -> Verification:
    """Run an exported model, by its runtime or, of Core ML, in the reference interpreter; with a model, compare.

    path: an .xml, .onnx, .aimodel or .mlpackage, or a folder with one. model: that it should be, of transformers or
    any module of named tensors; it is left alone. data: batches of inputs or a data set to compare on; default for
    models of transformers: made up. task: default from the model's class. precision: of emulated arithmetic, for Core
    ML; default what the package declares. samples: inputs to compare on. length: tokens of a text that is made up.

    - Shapes and dtypes: tensors [batch, …] as the forward takes them; the model is compared in float32.
    - Units: differences as the outputs have them, relative ones over the largest output; bytes.
    - Raises UserError for a path or data that cannot be used, ExportError for a file that is broken or has other
      outputs. One that computes other numbers is no error: `passed` is False, and says so when it is printed.
    - Source: what `mptrain verify` runs.
    """
    file, spec = found_in(Path(path))
    if spec.ending in INTERPRETED:
        if data is not None:
            raise UserError("data: inputs of a Core ML package are made up from its own shapes; drop it")
        from mptrain.commands.verify import verify as interpret
        from mptrain.commands.verify_source import as_stored

        source = None if model is None else as_stored(own_copy(model))
        facts = interpret(file, precision=precision or "stored", model=source)
        return Verification(file, facts["passed"], facts)
    if precision is not None:
        raise UserError(f"precision={precision!r}: is for Core ML packages, which are emulated; {file} is run")
    found = None
    if model is not None:
        found = loaded(own_copy(model), data, where="data", task=task, count=samples, length=length)
    elif data is not None:
        raise UserError("data: is what file and model are compared on; give a model, or drop it")
    facts = verify_file(file, spec, found)
    return Verification(file, facts["passed"], facts)
