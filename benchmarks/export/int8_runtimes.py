"""int8 of a JPQD model on two runtimes: OpenVINO and onnxruntime, the decisions of each, its size and its time.

    mptrain recipe jpqd-bert --set stages.jpqd.quantize.reduce_range=true
    python -m benchmarks.export.int8_runtimes --run runs/jpqd-bert --json benchmarks/results/int8_runtimes.json

Both files are written from the one model with fake quantizers that the run trained, and from the same model without
them in fp32. A row <name of the run>/<runtime>-<precision>:

    of_quantized    share of the whole test split for which it chooses the class of the torch model with fake quantizers
    of_stored       the same, of that model with the embeddings that int8 files store. Runs train with these since
                    quantizers round the rows of embeddings; in one from before, the files round them for the first time
    of_fp32         the same, of the torch model without quantizers: what int8 changes at all
    rms             of the logits, from those of the model of `of_stored`
    accuracy        on the test split; that of the torch models is in `torch`
    size_bytes      of the model's files
    ms              median CPU time of a call, batch 1, 128 tokens, one thread; all files of a run take turns in every
                    round, and the order rotates
    of_openvino     median over the rounds of that round's time over OpenVINO's in the same precision
    of_own_fp32     over the same runtime's fp32 file
    int8_layers     layers with weights that compute in integers, of all, as the runtime says of its own graph

Rows torch-stored, torch-float64 and torch-shifted are no files: the model of `of_stored`, and two other executions of
it in torch (int8_floor.py), which say how near to it a runtime can come. `levels` says how the share of activations
that are rounded to another level grows from quantizer to quantizer in these two.

Rows of other runs are kept. A CPU without VNNI or AMX adds two products of int8 numbers in 16 bits: there runs are
asked to be trained with `reduce_range`, for the numbers would be those of that CPU alone, and int8 gains little time.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.export.int8_floor import in_float64, levels, shifted
from benchmarks.kit.paired import markdown, turns, write
from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.integers import rounded_tables
from mptrain.core.errors import UserError
from mptrain.core.host import adds_int8_in_16_bits
from mptrain.core.signature import MASK, Batch, by_name
from mptrain.data.load import load_data
from mptrain.data.tasks.base import Task
from mptrain.export.base import Runner, Source
from mptrain.export.formats import format_of
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import Recipe
from mptrain.recipe.exports.onnx import Onnx
from mptrain.recipe.exports.openvino import OpenVino
from mptrain.recipe.stage import Stage
from mptrain.recipe.weights import Qat, stored_embeddings

LEAST = 0.98
LENGTH = 128
COUNTED = 64  # test sentences of which levels are compared
FORMATS = {
    "openvino": OpenVino(id="ov", format="openvino", of=[], precision=["int8"]),
    "onnx": Onnx(id="onnx", format="onnx", of=[], precision=["int8"]),
}
Row = dict[str, Any]
Outputs = list[Mapping[str, Any]]


def asked(model: Callable[[Batch], Any], task: Task) -> tuple[float, Outputs]:
    """Accuracy on the test split, and the outputs of its batches, which come in one order for every model."""
    kept: Outputs = []

    def forward(batch: Batch) -> Any:
        kept.append({name: np.asarray(value) for name, value in model(batch).items()})
        return kept[-1]

    return task.evaluate(forward, "test")[0].value, kept


def alike(task: Task, one: Outputs, other: Outputs) -> float:
    pairs = zip(one, other, strict=True)
    return float(np.concatenate([task.agreement(a, b, {}) for a, b in pairs]).mean())


def written(
    runtime: str, precision: str, model: nn.Module, task: Task, stage: Stage, folder: Path
) -> tuple[Runner, int]:
    """The file, run with one thread, and its size."""
    form, embeddings = format_of(FORMATS[runtime]), stored_embeddings(stage.quantize)
    source = Source(
        lambda: form.torch(copy.deepcopy(model), precision, embeddings).eval(),
        task.signature(), task.example(2, 16), precision, embeddings, True, lambda: [],
    )  # fmt: skip
    folder.mkdir()
    done = form.write(source, folder)
    return form.open(done.path, source, 1), done.size_bytes


def apart(one: Outputs, other: Outputs) -> float:
    """The RMS difference of their logits."""
    found = [np.square(np.float64(a["logits"]) - b["logits"]).ravel() for a, b in zip(one, other, strict=True)]
    return float(np.sqrt(np.concatenate(found).mean()))


def over(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def compared(run: Path, rounds: int) -> tuple[list[Row], Row]:
    """The rows of a run, and what is common to them."""
    report = json.loads((run / "report.json").read_text())
    recipe = Recipe.model_validate(report["recipe"])
    stages = [(s, s.quantize) for s in recipe.stages if isinstance(s.quantize, Qat)]
    if not stages:
        raise UserError(f"{run}: none of its stages has quantize mode qat; give a run of jpqd-bert")
    stage, quantize = stages[0]
    trained = run / report["checkpoints"][stage.id]  # whose tokenizer may have been cut
    processor = load_processor(recipe.model.model_copy(update={"path": str(trained)}))
    task = load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed)
    model = artifact.load(trained).eval()
    plain = quantizers.plain(model).eval()
    stored = rounded_tables(model, embeddings=stored_embeddings(quantize))[0].eval()
    others = {"float64": in_float64(stored), "shifted": shifted(stored)}
    with torch.no_grad():
        known = {
            name: asked(lambda b, torch_model=torch_model: by_name(torch_model(**b)), task)  # type: ignore[misc]
            for name, torch_model in {"int8": model, "fp32": plain, "stored": stored, **others}.items()
        }

    def row(name: str, accuracy: float, outputs: Outputs) -> Row:
        found = {
            "name": f"{recipe.name}/{name}",
            "of_quantized": alike(task, known["int8"][1], outputs),
            "of_stored": alike(task, known["stored"][1], outputs),
            "of_fp32": alike(task, known["fp32"][1], outputs),
            "rms": apart(known["stored"][1], outputs),
            "accuracy": accuracy,
        }
        print(json.dumps(found), flush=True)
        return found

    rows: list[Row] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners: dict[str, Runner] = {}
        for precision in ("fp32", "int8"):
            for runtime in FORMATS:
                name = f"{recipe.name}/{runtime}-{precision}"
                runner, size = written(runtime, precision, model, task, stage, scratch / f"{runtime}-{precision}")
                runners[name] = stack.enter_context(closing(runner))
                accuracy, outputs = asked(runner, task)
                more = {"size_bytes": size, "int8_layers": layers(runner)}
                rows.append(row(f"{runtime}-{precision}", accuracy, outputs) | more)
        batch = task.example(1, LENGTH)
        times = turns({name: partial(runner, batch) for name, runner in runners.items()}, rounds)
    for found in rows:
        runtime, precision = found["name"].rsplit("/", 1)[1].split("-")
        mine = times[found["name"]]
        found |= {
            "ms": 1e3 * statistics.median(mine),
            "of_openvino": over(mine, times[f"{recipe.name}/openvino-{precision}"]),
            "of_own_fp32": over(mine, times[f"{recipe.name}/{runtime}-fp32"]),
        }
    rows += [row(f"torch-{name}", *known[name]) for name in ("stored", *others)]
    batch = task.without_targets(task.collate([task.test[i] for i in range(COUNTED)]))
    facts = {
        "examples": len(task.test),
        "reduce_range": quantize.reduce_range,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "torch": {name: {"accuracy": accuracy} for name, (accuracy, _) in known.items()},
        "levels": {name: levels(stored, other, batch, batch[MASK].bool()) for name, other in others.items()},
        "fake_quantized_as_fp32": alike(task, known["fp32"][1], known["int8"][1]),
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }
    return rows, {recipe.name: facts}


def layers(runner: Runner) -> str:
    """ "35 of 36", of the layers with weights, by what the runtime's own graph says they compute in."""
    found = runner.facts().layer_precisions or {}
    integer = sum(count for kinds in found.values() for kind, count in kinds.items() if kind == "i8")
    return f"{integer} of {sum(sum(kinds.values()) for kinds in found.values())}"


def bars(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    whose = {"of_quantized": "", "of_stored": " with the file's embeddings"}
    found = []
    for runtime in FORMATS:
        own = [row for row in rows if row["name"].endswith(f"/{runtime}-int8")]
        for column, words in whose.items():
            least = min(row[column] for row in own)
            text = f"{runtime}: int8 chooses what the fake-quantized model{words} chooses for 98% of the test split"
            found.append((f"{text}: {least:.2%}", least >= LEAST))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run, one of whose stages is int8 QAT")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": [], "runs": {}}
    rows, facts = compared(options.run, options.rounds)
    (name,) = facts
    rows = [row for row in kept["rows"] if not row["name"].startswith(f"{name}/")] + rows
    runs = kept["runs"] | facts
    more = {"sixteen_bit_sums": adds_int8_in_16_bits(), "length": LENGTH, "runs": runs}
    write(
        options.json,
        rows,
        bars(rows),
        told(rows, runs),
        plotted=None,
        **more | {"clock": "CPU time of the process"},
    )


def told(rows: Sequence[Row], runs: Mapping[str, Row]) -> str:
    """The table, and what it takes to read it."""
    paragraphs = [table(rows)]
    for name, facts in runs.items():
        width = 1.96 * math.sqrt(LEAST * (1 - LEAST) / facts["examples"])
        grown = []
        for other, found in facts["levels"].items():
            place, first = next((i, q["differ"]) for i, q in enumerate(found, 1) if q["differ"])
            grown.append(
                f"torch-{other} {first:.1e} at quantizer {place}, {max(q['differ'] for q in found):.0%} at most"
            )
        own = next(row["of_quantized"] for row in rows if row["name"] == f"{name}/torch-stored")
        paragraphs.append(
            f"{name}: {facts['examples']:,} sentences; a share near {LEAST:.0%} is known to ±{width:.1%} (95%). Two"
            " other executions of the model with the file's embeddings, which differ from it in the rounding of float32"
            f" alone, round this share of activations to another level: {'; '.join(grown)} (`levels` in the JSON, of"
            f" {COUNTED} sentences). Their rows are the floor that an int8 row is to be read against. Embeddings that"
            " files round cost the rest: with them the torch model itself agrees with the model as it was trained in"
            f" {own:.2%}, where training did not round them."
        )
    return "\n\n".join(paragraphs)


def table(rows: Sequence[Row]) -> str:
    columns = {
        "name": "run/file", "of_quantized": "as the fake-quantized", "of_stored": "with the file's embeddings",
        "rms": "RMS of logits", "of_fp32": "as without quantizers",
        "accuracy": "accuracy", "mb": "MB", "int8_layers": "layers in int8", "ms": "ms",
        "of_openvino": "of OpenVINO's time", "of_own_fp32": "of its fp32's time",
    }  # fmt: skip
    shares = ("of_quantized", "of_stored", "of_fp32", "accuracy")
    cells = [{**r, "rms": f"{r['rms']:.3f}", **{n: f"{r[n]:.2%}" for n in shares}} for r in rows]
    for row in cells:
        row |= {"mb": row["size_bytes"] / 1e6} if "size_bytes" in row else {}
    where = (
        "This CPU has neither VNNI nor AMX: it adds two products of int8 numbers in 16 bits, so int8 has no fast"
        " instructions here, and 7-bit weights (`reduce_range`) keep the numbers right."
    )
    return markdown(cells, columns) + (f"\n\n{where}" if adds_int8_in_16_bits() else "")


if __name__ == "__main__":
    main()
