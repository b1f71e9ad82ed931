"""`mptrain verify`: run a saved Core ML package in the reference interpreter and say what it does.

Inputs are made up from the package's own shapes: several batches and lengths inside its ranges, padding where there
is a mask, pixels of 0 to 255 for pictures. A package with a key-value cache reads one text, piece by piece. With the
source model the outputs are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.commands.verify_source import compared
from mptrain.core.signature import Batch, Outputs
from mptrain.export.torch.texts import Texts
from mptrain.mil.facts import facts
from mptrain.mil.features import Feature
from mptrain.mil.interpreter import LIMITS, Interpreter, Record, Rounding
from mptrain.mil.program import Name, Program, is_float
from mptrain.mil.wrapping import classifier
from mptrain.verify import overflow

SCHEMA = "mptrain.verify/v1"
LONGEST = 128  # tokens of a made-up text, where the package takes more
EXACT = 1e-4  # relative error of an output row in float32


def verify(package: Path, *, precision: Rounding = "stored", model: nn.Module | None = None) -> dict[str, Any]:
    """Facts as JSON values; `passed` is False for outputs that are not finite, or not the model's.

    precision: of the emulation; "stored" is what the package declares. model: the source, in float32.
    Raises UserError for what is no package, ExportError that lists operations it does not know.
    """
    interpreter = Interpreter(package, precision)
    program = interpreter.program
    vocabulary = _vocabulary(package, program, model)
    texts = _cached(interpreter)
    batches = made_up(program, vocabulary) if texts is None else [_text(texts.max_length, vocabulary)]
    forward: Callable[[Batch], Outputs] = interpreter if texts is None else texts
    rows: list[Record] = []
    runs = []
    for batch in batches:
        interpreter.reset()
        calls = [batch] if texts is None else list(texts.calls(batch["input_ids"][0]))
        rows += interpreter.records(calls)
        runs += [{"shapes": {name: list(value.shape) for name, value in call.items()}} for call in calls]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "package": str(package),
        "precision": precision,
        "specification": program.specification,
        "inputs": [str(feature) for feature in program.inputs],
        "states": {name: list(result.shape) for name, result in program.states.items()},
        "outputs": list(program.main.outputs),
        **facts(program),
        "runs": runs,
        "operations_run": [asdict(record) for record in _merged(rows)],
        "limits": LIMITS,
    }
    broken = [row for row in found["operations_run"] if row["nan"] or row["infinite"]]
    found["not_finite"] = [row["name"] for row in broken]
    classes = classifier(program)
    found["classes"] = None if classes is None else list(classes.classes)
    outputs = []
    for batch in batches:
        interpreter.reset()
        given = {name: value for name, value in forward(batch).items() if classes is None or name != classes.label}
        outputs.append({name: torch.as_tensor(value).float() for name, value in given.items()})
    finite = all(bool(value.isfinite().all()) for output in outputs for value in output.values())
    found["outputs_finite"] = finite
    found["parity"] = None
    passed = finite
    if model is not None:
        found["parity"] = compared(model, program, batches, outputs)
        limit = EXACT if precision == "fp32" or found["inference_precision"] == "f32" != precision else None
        if limit is None or precision == "fp16" or any(state.dtype == "FLOAT16" for state in program.states.values()):
            limit = overflow.MAX_ERROR
        found["parity"]["limit"] = limit
        passed = passed and found["parity"]["error"] <= limit
    found["passed"] = passed
    return found


def _cached(interpreter: Interpreter) -> Texts | None:
    """How a package that keeps a key-value cache reads texts; None for others."""
    inputs = {feature.name: feature for feature in interpreter.program.inputs}
    places = [result.shape[2] or 1 for name, result in interpreter.program.states.items() if name.startswith("key_")]
    if set(inputs) != {"input_ids", "position"} or not places:
        return None
    return Texts(interpreter, tokens=inputs["input_ids"].bounds[1][1], max_length=places[0])


def _text(places: int, vocabulary: int) -> Batch:
    length = min(LONGEST, places)
    return {"input_ids": torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))}


def made_up(program: Program, vocabulary: int) -> list[Batch]:
    """Inputs at the least, a middle and the largest size (at most 2 × LONGEST) that the package takes."""
    draw = torch.Generator().manual_seed(0)
    return [
        {feature.name: _value(feature, shapes[feature.name], vocabulary, draw) for feature in program.inputs}
        for shapes in _shapes(program.inputs)
    ]


def _shapes(features: tuple[Feature, ...]) -> list[dict[str, tuple[int, ...]]]:
    listed = [feature for feature in features if feature.shapes is not None]
    if listed:
        count = max(len(feature.shapes or ()) for feature in listed)
        return [{f.name: f.shapes[i] if f.shapes else tuple(lo for lo, _ in f.bounds) for f in features}
                for i in range(count)]  # fmt: skip
    found = []
    for part in (0.0, 0.5, 1.0):
        shapes = {
            f.name: tuple(_between(lo, hi, 2 if axis == 0 else LONGEST, part) for axis, (lo, hi) in enumerate(f.bounds))
            for f in features
        }
        if shapes not in found:
            found.append(shapes)
    return found


def _between(low: int, high: int, most: int, part: float) -> int:
    high = max(low, min(high, most))
    return round(low + part * (high - low))


def _value(feature: Feature, shape: tuple[int, ...], vocabulary: int, draw: torch.Generator) -> Tensor:
    if feature.picture:
        return torch.randint(256, shape, generator=draw).float()
    if is_float(feature.dtype):
        return torch.randn(shape, generator=draw)
    if "mask" in feature.name:
        mask = torch.ones(shape, dtype=torch.long)
        if len(shape) == 2 and shape[1] > 2:
            mask[0, -(shape[1] // 3) :] = 0
        return mask
    if "type" in feature.name:
        return torch.zeros(shape, dtype=torch.long)
    return torch.randint(vocabulary, shape, generator=draw)


def _vocabulary(package: Path, program: Program, model: nn.Module | None) -> int:
    """Of the model's config, or the one beside the package, else rows of the largest table that is looked up."""
    config = getattr(model, "config", None)
    beside = Path(package).parent / "config.json"
    size = getattr(config, "vocab_size", None)
    if size is None and beside.is_file():
        size = json.loads(beside.read_text(encoding="utf-8")).get("vocab_size")
    if size is not None:
        return int(size)
    shapes = {result.name: result.shape for op in program.operations() for result in op.results}
    shapes |= {name: tuple(v.shape) for name, v in program.constants.items() if isinstance(v, Tensor)}
    tables = [op.inputs["x"][0].name for op in program.operations() if op.type == "gather" and _named(op.inputs["x"])]
    return max((shapes[name][0] or 2 for name in tables if len(shapes.get(name, ())) == 2), default=2)


def _named(values: list[Any]) -> bool:
    return isinstance(values[0], Name)


def _merged(rows: list[Record]) -> list[Record]:
    """One record to each operation, the operations that come nearest to the limit of float16 first."""
    found: dict[str, Record] = {}
    for row in rows:
        known = found.setdefault(row.name, row)
        if known is not row:
            known.largest = max(known.largest, row.largest)
            for field in ("nan", "infinite", "zeroed", "subnormal", "values"):
                setattr(known, field, getattr(known, field) + getattr(row, field))
    return sorted(found.values(), key=lambda row: (-(row.nan + row.infinite > 0), -row.largest))
