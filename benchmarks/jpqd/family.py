"""A family of speed-ups in one run against as many runs: what it takes, and how its points score.

    python -m benchmarks.jpqd.family --json benchmarks/results/family.json --dense FOLDER…

The dense MiniLM of the film reviews (2 epochs; trained here unless --dense names it, or some of other seeds, and then
all is done for each) is what all runs start from and learn from: `prune: {method: curvature, keep: {speedup: …}}`, one
epoch with distillation, and the fp32 export, scored on the test split. `family` is one run with a list of speed-ups,
whose points after the first start from the last and train `recovery` of an epoch; the others are a run to each
speed-up, from the dense model. Every run is a process of its own on one thread: `cpu_s` is all that it took, from start
to end, export and scores included, and what others do on the host does not change it as it does `wall_s`. `ahead` is
the accuracy of a point of the family less that of its own run, both in the mean of the dense models, paired over the
reviews. Runs that are in the file are kept, so the command can be stopped and repeated; --recovery adds families with
other shares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.jpqd.curve import dense_run
from benchmarks.jpqd.distil import mean_of
from mptrain.core.disk import read_json
from mptrain.core.host import host
from mptrain.flow.identity import versions
from mptrain.measure.intervals import interval, paired_difference
from mptrain.recipe.family import RECOVERY

SPEEDUPS = (2, 3, 4, 6, 8)
BAR = 0.5
Row = dict[str, Any]


def recipe(keep: Row, dense: Path, folder: Path) -> Row:
    train = {"epochs": 1, "lr": 1e-4, "batch_size": 32, "checkpoint_steps": 1000}
    prune = {"method": "curvature", "keep": keep, "round_ffn": 16}
    stage = {"id": "p", "teacher": "model", "distill": {"weight": 0.9}, "train": train, "prune": prune}
    return {
        "schema": "mptrain/v1",
        "name": "bench",
        "model": {"path": str(dense), "task": "text-classification", "dropout": 0.0},
        "data": {"source": "packaged:film-reviews", "calibration": {"samples": 512, "batch_size": 32}},
        "stages": [stage],
        "export": [{"id": "ov", "format": "openvino", "of": ["p"], "precision": ["fp32"]}],
        "evaluate": {"latency": {"batch": [1], "length": [128], "threads": [1], "runs": 15}, "floor": False},
        "gates": {"parity": None, "agreement": None, "fused_attention": None},
        "output": {"dir": str(folder)},
    }


def ran(name: str, keep: Row, dense: Path, work: Path) -> Row:
    """A run, in a process of its own."""
    folder = work / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = Path(f"{folder}.yaml")
    file.write_text(yaml.safe_dump(recipe(keep, dense, folder)))
    cpu, wall = _children(), time.monotonic()
    command = [sys.executable, "-m", "mptrain", "recipe", str(file), "--fresh"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    cpu, wall = _children() - cpu, time.monotonic() - wall
    report = read_json(folder / "report.json")
    points = {}
    for variant in report["variants"]:
        facts = report["methods"][variant["stage"]]["facts"]["prune"]
        scores = read_json(folder / "export" / f"{variant['id']}.json")["scores"][0]["stats"]
        points[f"{1 / facts['budget']['asked']:g}"] = {
            "accuracy": float(np.mean([row[0] for row in scores])),
            "correct": "".join(str(int(row[0])) for row in scores),
            "share": facts["budget"]["measured"],
            "dropped": facts["curvature"]["dropped"],
            "validation": _validation(folder, variant["stage"]),
        }
    return {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1), "steps_s": report["wall_s"], "points": points}


def _validation(folder: Path, stage: str) -> float | None:
    """The last score on the validation split that training logged."""
    history = read_json(folder / "stages" / stage / "1-finetune" / "done.json")["history"]
    return next((row["eval/accuracy"] for row in reversed(history) if "eval/accuracy" in row), None)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def named(name: str, seed: int) -> str:
    """A run of the dense model that stands at that place."""
    return name if seed == 0 else f"{name}/{seed + 1}"


def summary(runs: dict[str, Row]) -> list[Row]:
    """A row to each family, of the dense models for which it and all of the runs are there: what it took against the
    runs, and its points against theirs."""
    found = []
    for name in (name for name in runs if name.startswith("family-") and "/" not in name):
        every = [name, *(f"run-{x}" for x in SPEEDUPS)]
        done = [d for d in range(len(runs)) if all(named(one, d) in runs for one in every)]
        if not done:
            continue
        families = [runs[named(name, d)] for d in done]
        others = {x: [runs[named(f"run-{x}", d)] for d in done] for x in SPEEDUPS}
        total = {
            clock: (sum(run[clock] for run in families), sum(run[clock] for each in others.values() for run in each))
            for clock in ("cpu_s", "wall_s")
        }
        ratio = total["cpu_s"][0] / total["cpu_s"][1]
        points = [point(x, families, others[x]) for x in SPEEDUPS]
        row = {"name": name, "recovery": float(name.removeprefix("family-")), "seeds": len(done), "points": points}
        found.append({**row, "ratio": ratio, **total, "met": ratio <= BAR})
    return found


def point(speedup: int, families: list[Row], others: list[Row]) -> Row:
    """Of a speed-up, in the mean of the dense models."""
    both = [[run["points"][f"{speedup}"] for run in runs] for runs in (families, others)]
    mine, its = (mean_of([one["correct"] for one in points]) for points in both)
    ahead = paired_difference(mine, its)
    return {
        "speedup": speedup,
        "n": mine.n,
        "family": [mine.value, *interval(mine)],
        "run": [its.value, *interval(its)],
        "ahead": [ahead.value, ahead.low, ahead.high],
        "measured": [1 / statistics.mean(one["share"] for one in points) for points in both],
        "each": [a["accuracy"] - b["accuracy"] for a, b in zip(*both, strict=True)],
    }


def table(result: Row) -> str:
    lines = []
    for row in result["rows"]:
        mine, its = row["cpu_s"]
        lines += [
            f"Points after the first train {row['recovery']:g} of an epoch"
            f"{' (default)' * (row['recovery'] == RECOVERY)}; the mean of {row['seeds']} dense models:"
            f" {mine / 60:.1f} CPU minutes for the families, {its / 60:.1f} for {len(row['points'])} runs to each,"
            f" {100 * row['ratio']:.0f}% (bar: {100 * BAR:.0f}%, {'met' if row['met'] else 'missed'}).",
            "",
            "| asked for | family: measured | accuracy | own run: measured | accuracy | family ahead by | one by one |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for p in row["points"]:
            a = [100 * x for x in p["ahead"]]
            cells = [f"{p['speedup']}×", f"{p['measured'][0]:.2f}×", f"{100 * p['family'][0]:.1f}%"]
            cells += [f"{p['measured'][1]:.2f}×", f"{100 * p['run'][0]:.1f}%"]
            each = ", ".join(f"{100 * x:+.1f}" for x in p["each"])
            lines.append(f"| {' | '.join([*cells, f'{a[0]:+.1f} ({a[1]:+.1f} … {a[2]:+.1f})', each])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dense", type=Path, nargs="*", help="folders of trained dense models; default: train one")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-family"), help="folder for the runs")
    parser.add_argument("--recovery", type=float, nargs="*", default=[RECOVERY], help="families to run")
    options = parser.parse_args()
    denses = options.dense or [dense_run("0", None, options.work) / "stages/dense/0-train/model"]
    result: Row = {"runs": {}}
    if options.json.is_file():
        result = json.loads(options.json.read_text())
    result |= {"host": host(), "versions": versions()}
    wanted: dict[str, Row] = {
        f"family-{share:g}": {"speedup": list(SPEEDUPS), "recovery": share} for share in options.recovery
    }
    wanted |= {f"run-{x}": {"speedup": float(x)} for x in SPEEDUPS}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for (seed, dense), (of, keep) in itertools.product(enumerate(denses), wanted.items()):
        name = named(of, seed)
        if name not in result["runs"]:
            result["runs"][name] = ran(name, keep, dense.absolute(), options.work)
            told = {k: v for k, v in result["runs"][name].items() if k != "points"}
            accuracy = {x: [p["validation"], p["accuracy"]] for x, p in result["runs"][name]["points"].items()}
            print(json.dumps({"name": name, **told, "accuracy": accuracy}), flush=True)
        result["rows"] = summary(result["runs"])
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
