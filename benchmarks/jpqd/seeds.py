"""A bundled recipe with several seeds: the accuracy that one run shows, and its mean over them.

    python -m benchmarks.jpqd.seeds --recipe jpqd-bert-small --json benchmarks/results/jpqd_seeds.json

`mptrain recipe NAME` once for each seed, in a process of its own, dense training included. A row has, of the smallest
int8 variant: size, speed (batch 1, 128 tokens, one thread) and the difference in accuracy on the test split with its
paired 95% interval; speed_fp32 is that of the pruned model in float. The row `mean` resamples the test examples of all
seeds together: over them, the mean of the variants less the mean of the dense models, so its interval is that of the
reviews, and the spread of the rows is that of the seeds. A run that was stopped goes on, one that is done is not run
again. A CPU without VNNI takes --set stages.jpqd.quantize.reduce_range=true.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mptrain.core.disk import read_json, write_json
from mptrain.core.host import host
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.flow.identity import versions
from mptrain.measure.intervals import paired_difference

SETTING = "b1_s128_t1"
MISSED_GATE = 3
"""the exit status of a run that is whole, with a report, and worse than its recipe allows"""
Row = dict[str, Any]


def ran(name: str, seed: int, folder: Path, changes: list[str], reuse: Path | None) -> Path:
    """The folder of the recipe's run with that seed. reuse: a run whose stages are taken over where they are equal."""
    command = [sys.executable, "-m", "mptrain", "recipe", name, *(["--reuse", str(reuse)] if reuse else [])]
    for change in (f"seed={seed}", f"output.dir={folder}", *changes):
        command += ["--set", change]
    done = subprocess.run(command)
    if done.returncode not in (0, MISSED_GATE):
        done.check_returncode()
    return folder


def correct(folder: Path, variant: str) -> np.ndarray:
    """float64 [n]: 1 where the exported variant is right."""
    (score, *_) = read_json(folder / "export" / f"{variant}.json")["scores"]
    return np.array(score["stats"], dtype=np.float64)[:, 0]


def row(seed: int, folder: Path) -> tuple[Row, np.ndarray, np.ndarray]:
    """A run's row, and what its smallest int8 variant and its dense model have right."""
    report = read_json(folder / "report.json")
    compared = report["comparisons"]
    best = max((c for c in compared if "int8" in c["id"]), key=lambda c: c["size_ratio"])
    floats = [c["speedup"][SETTING] for c in compared if c["id"].endswith("_fp32")]
    found = {
        "name": f"seed {seed}",
        "variant": best["id"],
        "size_ratio": best["size_ratio"],
        "speedup": best["speedup"][SETTING],
        "speedup_fp32": max(floats, default=None),
        "delta": [best["accuracy_delta"], *best["accuracy_delta_ci95"]],
        "minutes": report["wall_s"]["total"] / 60,
    }
    return found, correct(folder, best["id"]), correct(folder, report["baseline"])


def mean(rows: list[Row], variants: list[np.ndarray], dense: list[np.ndarray]) -> Row:
    a, b = (Score("accuracy", np.mean(each, axis=0)[:, None], MEAN) for each in (variants, dense))
    found = paired_difference(a, b)
    average = {k: float(np.mean([r[k] for r in rows])) for k in ("size_ratio", "speedup", "speedup_fp32", "minutes")}
    accuracies = {"accuracy": a.value, "dense": b.value, "n": a.n}
    return {"name": "mean", **average, "delta": [found.value, found.low, found.high], **accuracies}


def table(result: Row) -> str:
    lines = [
        f"# {result['recipe']} with {len(result['rows']) - 1} seeds",
        "",
        "| run | size | speed | speed in fp32 | accuracy against dense |",
        "|---|--:|--:|--:|---|",
    ]
    for r in result["rows"]:
        change = "{:+.2f} ({:+.2f} … {:+.2f})".format(*(100 * x for x in r["delta"]))
        lines.append(
            f"| {r['name']} | {r['size_ratio']:.2f}× | {r['speedup']:.2f}× | {r['speedup_fp32']:.2f}× | {change} |"
        )
    return "\n".join([*lines, "", f"n = {result['rows'][-1]['n']:,}; {result['host']['cpu']}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="jpqd-bert-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-seeds"), help="folder for the runs")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--reuse", metavar="RECIPE", help="whose runs are in --work: dense models of equal seeds")
    options = parser.parse_args()
    made = []
    for seed in options.seeds:
        folder = options.work / f"{options.recipe}-{seed}"
        reuse = options.work / f"{options.reuse}-{seed}" if options.reuse else None
        made.append(row(seed, ran(options.recipe, seed, folder, options.changes, reuse)))
    rows, variants, dense = map(list, zip(*made))
    result = {"recipe": options.recipe, "set": options.changes, "host": host(), "versions": versions()}
    result["rows"] = [*rows, mean(rows, variants, dense)]
    write_json(options.json, result)
    options.json.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
