"""Paired timing in one process and one thread, and the JSON the benchmarks write.

Each round times the baseline and the case next to each other and takes their ratio; a row shows the
median over rounds. The clock is the CPU time of the calling thread: on an idle machine that is wall
time, on a shared one it leaves out the time other processes had the core (but not their share of the
memory bandwidth; `load` in the JSON tells).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mptrain.core.host import host
from mptrain.flow.identity import versions

SHORTEST = 5e-3
"""seconds a timed stretch lasts at least; shorter work is repeated within it"""


def clock() -> float:
    return time.thread_time()


def seconds(work: Callable[[], Any], before: Callable[[], Any] | None = None, repeat: int = 1) -> float:
    """CPU seconds of one call; `before` runs untimed ahead of each.

    Work that is repeated runs once untimed first: what ran before it would otherwise decide what it finds in the
    cache, and as the order alternates, the median of an odd number of rounds would be that of one order.
    """
    total = 0.0
    if repeat > 1:
        if before is not None:
            before()
        work()
    for _ in range(repeat):
        if before is not None:
            before()
        start = clock()
        work()
        total += clock() - start
    return total / repeat


def repeats(work: Callable[[], Any], before: Callable[[], Any] | None = None) -> int:
    seconds(work, before)
    return max(1, round(SHORTEST / max(seconds(work, before), 1e-7)))


def compare(
    name: str,
    work: Callable[[], Any],
    baseline: Callable[[], Any],
    rounds: int,
    before: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """One row: median, smallest and largest ratio of `work` to `baseline`, and the median milliseconds of both."""
    counts = repeats(work, before), repeats(baseline)
    mine, base = [], []
    for number in range(rounds):
        pair = [
            lambda: mine.append(seconds(work, before, counts[0])),
            lambda: base.append(seconds(baseline, None, counts[1])),
        ]
        for one in pair if number % 2 else reversed(pair):
            one()
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    row = {
        "name": name,
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": rounds,
        "ms": 1e3 * statistics.median(mine),
        "baseline_ms": 1e3 * statistics.median(base),
    }
    print(f"{name:40s} {row['ratio']:9.2f}  ({row['min']:.2f} to {row['max']:.2f})  {row['ms']:10.2f} ms", flush=True)
    return row


def turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the process for each call, each after an untimed one; all take turns, and the order rotates."""
    order: list[str] = list(calls)
    found: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            calls[name]()
            begun = time.process_time()
            calls[name]()
            found[name].append(time.process_time() - begun)
    return found


def mean_interval(values: np.ndarray) -> list[float]:
    """[mean, low, high], 95%, normal."""
    mean, reach = float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)
    return [mean, mean - reach, mean + reach]


def bytes_allocated(work: Callable[[], Any]) -> int:
    """What one call allocates, from the profiler's allocation events."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def write(
    path: Path,
    rows: list[dict[str, Any]],
    bars: list[tuple[str, bool]],
    table: str,
    *,
    plotted: tuple[str, str] | None = ("ratio", "time over the baseline; line: all rounds"),
    **more: Any,
) -> None:
    """The JSON, and beside it a Markdown table of the same rows and a plot. plotted: key of the rows, and its label."""
    result = {
        "host": host(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the one thread",
        "load": os.getloadavg(),
        **more,
        "rows": rows,
        "bars": [{"bar": bar, "met": bool(met)} for bar, met in bars],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    verdicts = "\n".join(f"- {'met' if met else '**missed**'}: {bar}" for bar, met in bars)
    where = f"{result['host']['cpu']}, 1 thread, load average {os.getloadavg()[0]:.1f} at the end"
    path.with_suffix(".md").write_text(f"{table}\n\n{verdicts}\n\n{where}.\n")
    if plotted is not None:
        plot(path.with_suffix(".png"), rows, *plotted)
    print(verdicts)


def plot(path: Path, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A bar for every row, on a logarithmic axis, with its smallest and largest round where known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.get(key)]
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.26 * len(shown)))
    names, values = [row["name"] for row in shown], [row[key] for row in shown]
    axis.barh(names, values, color=["#1b6ca8" if "ours" in name else "#b0b7bf" for name in names], height=0.7)
    for i, row in enumerate(shown):
        if "min" in row:
            axis.plot([row["min"], row["max"]], [i, i], color="#333333", lw=1)
        axis.annotate(
            f"{row[key]:,.2f}", (row.get("max", row[key]), i), (4, 0), textcoords="offset points", va="center"
        )
    axis.set_xscale("log")
    axis.axvline(1, color="#333333", lw=0.8)
    axis.set_xlim(right=max(row.get("max", row[key]) for row in shown) * 2.5)
    axis.set_xlabel(label)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table; columns: key in the row -> heading."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        lines.append(
            "| "
            + " | ".join(f"{c:,.2f}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else c for c in cells)
            + " |"
        )
    return "\n".join(lines)
