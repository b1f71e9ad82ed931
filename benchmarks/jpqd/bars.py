"""Every bar of the project's own method as a row, read from the result files: `python -m benchmarks.jpqd.bars`.

Writes benchmarks/results/jpqd_bars.json: `rows` with `bar`, `value`, `low`, `high`, `limit`, `met`, `source`. `value`
is None, and `met` False, where a file does not have it: that has not been measured. To be ahead of another method the
whole interval has to be above zero; a loss, a size or a speed is met by its value. `--check` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.jpqd import recovery as recovery_runs
from benchmarks.jpqd.family import SPEEDUPS
from mptrain.core.disk import write_json
from mptrain.recipe.family import RECOVERY

RESULTS = Path(__file__).resolve().parents[1] / "results"
SETTING = "b1_s128_t1"
KEPT = (0.5, 0.33, 0.25, 0.15)
METHODS = ("modelopt_gradnas", "torch_pruning", "fisher", "magnitude")
SMALLEST = "jpqd-bert-small"
BUDGETS = (0.75, 0.5, 0.33, 0.25, 0.15)

Row = dict[str, Any]


def load(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def ahead(bar: str, value: float | None, source: str, interval: Any = (None, None)) -> Row:
    """interval: of the value; without one nobody is ahead."""
    low, high = interval
    met = low is not None and low > 0.0
    return {"bar": bar, "value": value, "low": low, "high": high, "limit": 0.0, "met": met, "source": source}


def at_least(bar: str, value: float | None, limit: float, source: str, interval: Any = (None, None)) -> Row:
    low, high = interval
    met = value is not None and value >= limit
    return {"bar": bar, "value": value, "low": low, "high": high, "limit": limit, "met": met, "source": source}


def at_most(bar: str, value: float | None, limit: float, source: str) -> Row:
    met = value is not None and value <= limit
    return {"bar": bar, "value": value, "low": None, "high": None, "limit": limit, "met": met, "source": source}


def one_shot() -> Iterator[Row]:
    source = "one_shot.json"
    rows = {row["name"]: row for row in load(source).get("rows", [])}
    for kept in KEPT:
        for method in METHODS:
            value, low, high = rows.get(f"{method}/{kept:g}", {}).get("curvature_ahead") or (None, None, None)
            name = f"curvature ahead of {method} at {100 * kept:.0f}%, without training"
            yield ahead(name, value, source, (low, high))


def recovery() -> Iterator[Row]:
    """After as many steps for all: nowhere behind, and ahead in the mean of the sizes."""
    source = "recovery.json"
    rows = {(r["method"], r["keep"]): r for r in load(source).get("rows", [])}
    for method in recovery_runs.METHODS[1:]:
        for kept in (*recovery_runs.KEPT, None):
            found = rows.get((method, kept), {}).get("curvature_ahead")
            value, low, high = found or (None, None, None)
            if kept is None:
                name = f"curvature ahead of {method} in the mean of 25 and 15%, after training"
                yield ahead(name, value, source, (low, high))
            else:
                row = ahead(f"curvature not behind {method} at {100 * kept:.0f}%, after training", value, source)
                yield row | {"low": low, "high": high, "met": high is not None and high >= 0.0}


def budgets() -> Iterator[Row]:
    source = "latency_budget.json"
    rows = {row["name"]: row for row in load(source).get("rows", [])}
    for precision in ("fp32", "int8"):
        for asked in BUDGETS:
            row = rows.get(f"{precision}, {asked:g}")
            value = None if row is None else abs(row["ratio"] / asked - 1.0)
            yield at_most(f"latency of {asked:g} asked for in {precision}, missed by", value, 0.05, source)


def family() -> Iterator[Row]:
    """Of the default recovery."""
    source = "family.json"
    row = next((row for row in load(source).get("rows", []) if row["recovery"] == RECOVERY), {})
    points = row.get("points", [])
    many = len(points) or len(SPEEDUPS)
    yield at_most(f"a family of {many} speed-ups: CPU time of that of as many runs", row.get("ratio"), 0.5, source)
    value, low, high = min((p["ahead"] for p in points), default=(None, None, None))
    name = "a family: accuracy of its points against runs of their own, the worst"
    yield at_least(name, value, -0.01, source, (low, high))


def runs() -> Iterator[Row]:
    for recipe, size, speed, drop in (
        ("jpqd-bert", 11.0, 6.0, None),
        (SMALLEST, 16.0, 9.0, None),
        ("prune-once", None, None, 0.015),
    ):
        source = f"runs/{recipe}.json"
        report = load(source)
        compared = [c for c in report.get("comparisons", []) if "int8" in c["id"]]
        best = max(compared, key=lambda c: c["size_ratio"], default=None)
        if size is not None:
            yield at_least(f"{recipe}: times smaller", best and best["size_ratio"], size, source)
            speeds = [c["speedup"][SETTING] for c in compared if (c.get("speedup") or {}).get(SETTING)]
            yield at_least(f"{recipe}: times as fast", max(speeds, default=None), speed or 0.0, source)
        if recipe == SMALLEST:
            floats = [c["speedup"][SETTING] for c in report.get("comparisons", []) if c["id"].endswith("_fp32")]
            yield at_least(f"{recipe}: times as fast in fp32", max(floats, default=None), 4.5, source)
        if drop is None:
            yield at_least(f"{recipe}: accuracy against dense, mean of seeds", *_mean_of_seeds(recipe))
            continue
        ends = best["accuracy_delta_ci95"] if best else (None, None)
        value = best["accuracy_delta"] if best else None
        yield at_least(f"{recipe}: accuracy against dense", value, -drop, source, ends)
    seconds = load("runs/prune-once.json").get("wall_s", {})
    taken = sum(s for name, s in seconds.items() if name.split("/")[0] in ("once", "int8", "export")) or None
    yield at_most("prune-once: seconds to prune, quantize and export", taken, 300.0, "runs/prune-once.json")


def _mean_of_seeds(recipe: str) -> tuple[float | None, float, str, Any]:
    source = "jpqd_seeds_default.json" if recipe == "jpqd-bert" else "jpqd_seeds.json"
    found = load(source)
    rows = found.get("rows", []) if found.get("recipe") == recipe else []
    value, low, high = next((row["delta"] for row in rows if row["name"] == "mean"), (None, None, None))
    return value, -0.01, source, (low, high)


def seed() -> Iterator[Row]:
    source = "seed_jpqd.json"
    rows = {row["name"]: row for row in load(source).get("rows", [])}
    row = rows.get("jpqd/int8", {})
    yield at_least("seed's scale, jpqd: times smaller", row.get("size_ratio"), 5.24, source)
    yield at_least("seed's scale, jpqd: times as fast", row.get("speedup"), 4.19, source)
    for split in ("dev", "test"):
        value, low, high = row.get(f"{split}_delta") or (None, None, None)
        yield at_least(f"seed's scale, jpqd: accuracy on {split} against dense", value, -0.01, source, (low, high))


def language_model() -> Iterator[Row]:
    """Of the mean loss, in nats a token."""
    source = "llm_prune.json"
    rows = {row["name"]: row["against"] for row in load(source).get("rows", [])}
    for row, *others in (
        ("pruned-80", "whole/gptq", "pruned-80/gptq"),
        ("pruned-70", "whole/gptq", "pruned-70/gptq", "shallow-70/trained"),
    ):
        for other in others:
            value, low, high = rows.get(f"{row}/trained", {}).get(other) or (None, None, None)
            ends = (None, None) if low is None or high is None else (-high, -low)
            name = f"a language model in int4, {row}/trained, has a lower loss than {other}"
            yield ahead(name, None if value is None else -value, source, ends)


def bars() -> dict[str, Any]:
    parts = (one_shot, recovery, budgets, family, runs, seed, language_model)
    return {"rows": [row for part in parts for row in part()]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with the file that is there")
    options = parser.parse_args()
    path, found = RESULTS / "jpqd_bars.json", bars()
    if options.check:
        if load(path.name) != json.loads(json.dumps(found)):
            print(f"{path} is not what the result files say: run `python -m benchmarks.jpqd.bars`", file=sys.stderr)
            return 1
        return 0
    write_json(path, found)
    for row in found["rows"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        print(f"{'met   ' if row['met'] else 'missed'} {row['bar']}: {value} (limit {row['limit']:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
