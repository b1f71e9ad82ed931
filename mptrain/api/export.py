"""`mptrain.export`: a model in memory to one format, compressed if asked, run again and compared."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mptrain.api.given import loaded, own_copy
from mptrain.api.shown import Shown
from mptrain.commands.compressions import Asked
from mptrain.commands.export import CALIBRATION, export_loaded, wanted_of
from mptrain.core.hooks import is_quantized

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """path: of the model's file or package, in `folder` with its config and processor. passed: it computes what the
    model does, within the default gate. facts: JSON values, what `mptrain export --json` writes."""

    folder: Path
    path: Path
    format: str
    precision: str
    size_bytes: int
    passed: bool
    facts: dict[str, Any]

    def _parts(self) -> Iterable[RenderableType]:
        from mptrain.report.render.exported import exported

        yield exported(self.facts)


def export(
    model: nn.Module,
    format: str = "openvino",
    *,
    to: str | Path | None = None,
    precision: str = "fp32",
    calibration: Any = None,
    data: Any = None,
    task: str | None = None,
    processor: Any = None,
    method: str | None = None,
    group_size: int | None = None,
    samples: int = 32,
    length: int = 128,
    **options: Any,
) -> Exported:
    """Write a model in a format, run what was written, and compare it with the model, which is left alone.

    model: of transformers, or any module that maps named tensors to named tensors; also pruned, quantized or with
    compressed weights. format: openvino, onnx, coreml, coreai. to: the folder to write, which must not exist; default
    a new one in the current folder, named after class, format and precision. precision: one of the format's (fp32,
    fp16, …), or compressed first: int8 (weights and activations), int8-weights, int4, palette1 … palette8.
    calibration: batches of inputs or a data set, for int8 and for the searches of int4 and fp16; targets among them are
    left out. data: others, to compare on; default some of the calibration, or made up. task: default from the model's
    class. processor: a tokenizer or the like, saved beside the model. method: of int8-weights and int4: rtn, scale or
    gptq. group_size: columns (int4) or rows (palette) that share a scale or table. samples: inputs to compare on.
    length: tokens of a text that is made up, and the longest where a format fixes one. options: further fields of a
    recipe's export entry, e.g. cache=512, minimum_deployment_target="iOS18".

    - Shapes and dtypes: tensors [batch, …] as the forward takes them; the model is exported from float32.
    - Units: bytes; differences relative to the largest output.
    - Raises UserError for arguments that do not fit, ExportError when the conversion fails. A file that computes other
      numbers is kept, warned of, and `passed` is False.
    - Source: what `mptrain export` runs.
    """
    name = type(model).__name__
    folder = _new_folder(name, format, precision) if to is None else Path(to)
    calibrated = calibration is not None or is_quantized(model)
    wanted = wanted_of(folder, format, precision, options, Asked(method, group_size), data=calibrated)
    copied = own_copy(model)
    first = calibration if data is None else data
    count = samples + (CALIBRATION if calibration is not None and data is None else 0)
    where = "calibration" if data is None and calibration is not None else "data"
    limit = min(length, wanted.spec.cache or length)
    found = loaded(copied, first, where=where, task=task, count=count, length=limit, processor=processor)
    others = None
    if data is not None and calibration is not None:
        kept = loaded(copied, calibration, where="calibration", task=task, count=CALIBRATION, length=limit)
        others = kept.samples.batches
    facts = export_loaded(
        found, wanted, samples=samples, length=limit, before=lambda: own_copy(model), name=name, calibration=others
    )
    done = Exported(
        folder, Path(facts["path"]), format, facts["precision"], facts["size_bytes"], facts["passed"], facts
    )
    if not done.passed:
        log.warning(
            "%s: the exported model does not compute what the model does (judged by %s, limit %g); it was kept",
            done.path,
            facts["judged_by"],
            facts["limit"],
        )
    return done


def _new_folder(name: str, format: str, precision: str) -> Path:
    base = re.sub(r"\W+", "-", f"{name}-{format}-{precision}".lower())
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())
