"""Pruning at once, without any training after it: accuracy against how much of the encoder is kept, method by method.

    python -m benchmarks.jpqd.one_shot --json benchmarks/results/one_shot.json
    python -m benchmarks.jpqd.one_shot --json benchmarks/results/one_shot.json --dense FOLDER
    .venv-bench/bin/python -m benchmarks.jpqd.one_shot --json benchmarks/results/one_shot.json --peers

The dense MiniLM of the film reviews (2 epochs, trained here unless --dense names it) is cut by each method from the
same 1,024 training reviews, and the torch model is scored on the test split, which no method sees. A row has the
accuracy with its 95% interval, the paired differences to the dense model and to curvature pruning, and the seconds
that pruning took. Rows that are in the file already are kept. `--peers` adds torch-pruning and ModelOpt's gradnas
(peers.py; `make setup-bench`), which prune the same model with the same reviews and their labels to as many parameters.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.jpqd.curve import add_dense, dense_run, recipe
from mptrain.compress.boundary import cut
from mptrain.compress.prune.base import Pruner
from mptrain.compress.prune.curvature import CurvaturePruner
from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.prune.magnitude import MagnitudePruner
from mptrain.compress.structure import costs
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.host import host
from mptrain.data.load import Task, load_data
from mptrain.data.tasks.metrics import Score
from mptrain.flow.identity import versions
from mptrain.measure.intervals import interval, paired_difference
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import Calibration, Curvature, Fisher, Magnitude
from mptrain.recipe import file as recipe_file

KEPT = (0.5, 0.33, 0.25, 0.15)
METHODS = ("curvature", "fisher+refit", "fisher", "magnitude")
PEERS = ("modelopt_gradnas", "torch_pruning")
SAMPLES = Calibration(samples=1024, batch_size=32)


def pruned(model: nn.Module, method: str, keep: float, task: Task) -> nn.Module:
    """The model that a method leaves, from labelled calibration batches where it needs labels."""
    kinds: dict[str, tuple[type[Pruner], type]] = {
        "curvature": (CurvaturePruner, Curvature),
        "fisher": (FisherPruner, Fisher),
        "magnitude": (MagnitudePruner, Magnitude),
    }
    name = method.partition("+")[0]
    kind, config = kinds[name]
    settings = {"method": name, "keep": {"encoder_params": keep}, "round_ffn": 16, "min_ffn": 16}
    settings |= {} if name == "curvature" else {"schedule": {"end": 0}}
    pruner = kind(config.model_validate(settings), structure=find_structure(model), phase_steps=0, steps_per_epoch=1)
    pruner.prepare(model)
    if isinstance(pruner, CurvaturePruner):
        pruner.look(model, task.calibration(SAMPLES.samples, SAMPLES.batch_size))
    else:
        pruner.collect(model, task.labelled(SAMPLES))
    inputs = task.calibration(SAMPLES.samples, SAMPLES.batch_size) if method.endswith("+refit") else None
    return cut(model, pruner, inputs)


def pruned_by_peer(dense: Path, peer: str, keep: float, task: Task) -> nn.Module:
    """The dense model in a folder without the units that a peer chose to leave out."""
    from benchmarks.jpqd import peers

    model = artifact.load(dense)
    structure = find_structure(model)
    encoder = sum(costs.params(block, block.units) for block in structure)
    params = sum(p.numel() for p in model.parameters()) - round((1 - keep) * encoder)
    batches = list(task.labelled(SAMPLES.model_copy(update={"batch_size": peers.BATCH})))
    left = peers.PEERS[peer](dense, batches, params)
    kept = peers.kept_of(structure, {name: p.detach() for name, p in model.named_parameters()}, left)
    return shrink(model, structure, kept)


def scored(model: nn.Module, task: Task, split: str) -> Score:
    model.eval()
    return task.evaluate(lambda batch: {"logits": model(**batch).logits}, split)[0]


def row(method: str, keep: float, score: Score, dense: Score, ours: Score | None, seconds: float) -> dict[str, Any]:
    low, high = interval(score)
    change = paired_difference(score, dense)
    found = {
        "name": f"{method}/{keep:g}",
        "method": method,
        "keep": keep,
        "n": score.n,
        "accuracy": score.value,
        "low": low,
        "high": high,
        "against_dense": [change.value, change.low, change.high],
        "seconds": round(seconds, 1),
    }
    if ours is not None:
        ahead = paired_difference(ours, score)
        found["curvature_ahead"] = [ahead.value, ahead.low, ahead.high]
    return found | {"correct": "".join(str(int(x)) for x in score.stats[:, 0])}


def table(result: dict[str, Any]) -> str:
    dense = result["dense"]
    lines = [
        f"Dense {100 * dense['accuracy']:.1f}% on {dense['n']} test reviews. Pruned at once, without training; paired"
        " intervals, 95%.",
        "",
        "| kept | method | accuracy | against dense | curvature is ahead by | seconds |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for r in sorted(result["rows"], key=lambda r: (-r["keep"], (*METHODS, *PEERS).index(r["method"]))):
        d, a = r["against_dense"], r.get("curvature_ahead")
        against = f"{100 * d[0]:+.1f} ({100 * d[1]:+.1f} … {100 * d[2]:+.1f})"
        ahead = f"{100 * a[0]:+.1f} ({100 * a[1]:+.1f} … {100 * a[2]:+.1f})" if a else ""
        what = f"| {100 * r['keep']:.0f}% | {r['method']} | {100 * r['accuracy']:.1f}%"
        lines.append(f"{what} | {against} | {ahead} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    add_dense(parser)
    parser.add_argument("--peers", action="store_true", help="also torch-pruning and gradnas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = recipe_file.validate(recipe("dense/-/100/0", None, options.work), "dense")
    dense_folder = options.dense
    if dense_folder is None:
        folder = options.work / "dense-seed0"
        if not (options.peers and folder.is_dir()):  # a run is of its environment, and peers have another
            folder = dense_run("0", None, options.work)
        dense_folder = folder / "stages/dense/0-train/model"
    task = load_data(spec.data, spec.model.task, load_processor(spec.model), seed=spec.seed)
    result: dict[str, Any] = {"rows": []}
    if options.json.is_file():
        result = json.loads(options.json.read_text())
    dense = scored(artifact.load(dense_folder), task, "test")
    low, high = interval(dense)
    result |= {
        "host": host(),
        "versions": versions(),
        "calibration": SAMPLES.samples,
        "dense": {"accuracy": dense.value, "low": low, "high": high, "n": dense.n},
    }
    done = {r["name"]: r for r in result["rows"]}
    for keep in KEPT:
        for method in [*METHODS, *(PEERS if options.peers else ())]:
            if f"{method}/{keep:g}" in done:
                continue
            ours = done.get(f"curvature/{keep:g}")
            of_ours = None if ours is None else like(dense, ours["correct"])
            begun = time.monotonic()
            if method in PEERS:
                model = pruned_by_peer(dense_folder, method, keep, task)
            else:
                model = pruned(artifact.load(dense_folder), method, keep, task)
            seconds = time.monotonic() - begun
            found = row(method, keep, scored(model, task, "test"), dense, of_ours, seconds)
            print({k: v for k, v in found.items() if k != "correct"}, flush=True)
            result["rows"].append(found)
            done[found["name"]] = found
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table(result) + "\n")


def like(score: Score, correct: str) -> Score:
    """A score of the same metric from which examples were right."""
    return Score(score.name, np.array([[float(bit)] for bit in correct]), score.of, score.unit, score.higher_is_better)


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    main()
