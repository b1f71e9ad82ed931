"""What int8 loses and wins back: `ignore: auto` beside nncf.quantize_with_accuracy_control.

    mptrain recipe ptq-retrieval --allow-code
    python -m benchmarks.auto_scopes --run runs/ptq-retrieval --json benchmarks/results/auto_scopes.json

On the dense model of a run, its calibration inputs and its validation split, one thread. `mptrain` searches the torch
model with fake quantizers, by modules and then by their operations; `nncf` the OpenVINO model on this CPU, by
operations. metric_fp32, metric_int8, metric_found: the task's main score, each on the model that the method scores;
null where outputs are not finite. recovered: the share of what int8 lost that is won back. scopes: what stays in float,
as it is written. nodes: what that is in the OpenVINO file. evaluations: scores of quantized models on the split.
seconds: from the float model to the answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedAccuracyRestorerParameters,
    AdvancedQuantizationParameters,
    OverflowFix,
)

from benchmarks.kit.paired import markdown, write
from mptrain.compress.quantize import quantizers, restore
from mptrain.core.host import adds_int8_in_16_bits
from mptrain.core.signature import Batch
from mptrain.data.load import Task, load_data
from mptrain.export.openvino.convert import convert
from mptrain.export.openvino.left import left
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import Ptq, Recipe

MAX_DROP = 0.002
Row = dict[str, Any]


def ours(model: torch.nn.Module, task: Task, batches: list[Batch], max_drop: float, reduce_range: bool) -> Row:
    config = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional", "reduce_range": reduce_range})

    def quantized(ignore: list[str]) -> torch.nn.Module:
        return quantizers.quantize(model, config.model_copy(update={"ignore": ignore}), batches)

    begun = time.monotonic()
    found = restore.search(model, quantized, batches, task.validated, max_drop)
    seconds = time.monotonic() - begun
    metrics = found["float"], found["int8"], found["found"]
    named = quantized(found["ignore"])
    graph = convert(named, task.example(2, 1), task.signature())
    nodes = [name for names in left(graph, quantizers.left_in_float(named)).values() for name in names]
    return row("mptrain", metrics, found["ignore"], nodes, found["evaluations"], seconds)


def theirs(model: torch.nn.Module, task: Task, batches: list[Batch], max_drop: float, reduce_range: bool) -> Row:
    """NNCF asks for the score of parts of the split, to rank; a search has none, so it gets that of the whole."""
    graph = convert(model, task.example(2, 1), task.signature())
    scored: list[tuple[ov.CompiledModel, float]] = []  # it asks for the same model several times
    names = task.signature().output_names

    def validate(compiled: ov.CompiledModel, items: Iterable[Any]) -> tuple[float, list[float]]:
        def forward(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
            return dict(zip(names, compiled({n: v.numpy() for n, v in batch.items()}).values()))

        if not scored or scored[-1][0] is not compiled:
            scored.append((compiled, task.evaluate(forward, "validation")[0].value))
        return scored[-1][1], [scored[-1][1]] * len(task.validation)

    rows = [task.without_targets(task.collate([task.validation[0]]))["pixel_values"].numpy()] * len(task.validation)
    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(batches)}
    fix = AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE if reduce_range else OverflowFix.DISABLE)
    calibration = nncf.Dataset([{n: v.numpy() for n, v in b.items()} for b in batches])
    begun = time.monotonic()
    found = nncf.quantize_with_accuracy_control(
        graph,
        calibration,
        nncf.Dataset(rows),
        validate,
        max_drop=max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(ranking_subset_size=len(rows)),
        advanced_quantization_parameters=fix,
        **options,
    )
    seconds = time.monotonic() - begun
    whole = nncf.quantize(graph, calibration, advanced_parameters=fix, **options)
    float_ = sorted(_quantized(whole) - _quantized(found))
    metrics = scored[0][1], scored[1][1], scored[-1][1]
    return row("nncf", metrics, float_, float_, len(scored) - 1, seconds)


def _quantized(graph: ov.Model) -> set[str]:
    """Operations that read what a FakeQuantize gives."""
    return {
        reader.get_node().get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for reader in node.output(0).get_target_inputs()
    }


def row(
    name: str,
    metrics: tuple[float, float | None, float],
    scopes: list[str],
    nodes: list[str],
    evaluations: int,
    seconds: float,
) -> Row:
    fp32, int8, found = metrics
    return {
        "name": name,
        "metric_fp32": fp32,
        "metric_int8": int8,
        "metric_found": found,
        "recovered": (found - int8) / (fp32 - int8) if int8 is not None and fp32 > int8 else None,
        "scopes": scopes,
        "nodes": nodes,
        "evaluations": evaluations,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished run, whose first stage is quantized")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--max-drop", type=float, default=MAX_DROP)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads((options.run / "report.json").read_text())
    recipe = Recipe.model_validate(report["recipe"])
    processor = load_processor(recipe.model, allow_code=True)
    task = load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed)
    model = artifact.load(options.run / report["checkpoints"][recipe.stages[0].id], allow_code=True)
    batches = task.calibration(recipe.data.calibration.samples, recipe.data.calibration.batch_size)
    reduced = adds_int8_in_16_bits()
    found = [method(model, task, batches, options.max_drop, reduced) for method in (ours, theirs)]
    precise = ("metric_fp32", "metric_int8", "metric_found", "recovered")
    shown = [
        {
            **r,
            "scopes": ", ".join(r["scopes"]),
            "nodes": len(r["nodes"]),
            **{n: "" if r[n] is None else f"{r[n]:.4f}" for n in precise},
        }
        for r in found
    ]
    columns = {name: name for name in found[0]}
    lost = max(r["metric_fp32"] - (r["metric_int8"] or 0.0) for r in found)
    bars = [
        ("int8 loses a point at least", lost >= 0.01),
        ("mptrain is within the limit", found[0]["metric_fp32"] - found[0]["metric_found"] <= options.max_drop + 1e-9),
        ("mptrain leaves no more nodes in float than nncf", len(found[0]["nodes"]) <= len(found[1]["nodes"])),
        ("mptrain needs no more evaluations than nncf", found[0]["evaluations"] <= found[1]["evaluations"]),
    ]
    more = {"limit": options.max_drop, "reduced_range": reduced, "validation": len(task.validation)}
    write(options.json, found, bars, markdown(shown, columns), plotted=None, **more)


if __name__ == "__main__":
    main()
