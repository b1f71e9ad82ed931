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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mptrain.report.measure import host
from mptrain.run import versions

SHORTEST = 5e-3
"""seconds a timed stretch lasts at least; shorter work is repeated within it"""


def clock() -> float:
    return time.thread_time()


def seconds(work: Callable[[], Any], before: Callable[[], Any] | None = None, repeat: int = 1) -> float:
    """CPU seconds of one call; `before` runs untimed ahead of each."""
    total = 0.0
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


def bytes_allocated(work: Callable[[], Any]) -> int:
    """What one call allocates, from the profiler's allocation events."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def write(path: Path, rows: list[dict[str, Any]], bars: list[tuple[str, bool]], table: str, **more: Any) -> None:
    """The JSON, and beside it a Markdown table of the same rows."""
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
    print(verdicts)


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
