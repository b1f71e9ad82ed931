"""Latency of all variants side by side, and the host they ran on.

Machines drift: they heat up, share caches and get neighbours. So the variants take turns:
for every setting (batch, length, threads) a round times each variant once, and the order
rotates from round to round, so that no variant always goes first. The median over the
rounds is reported, and a ratio of two medians compares times of the same minutes.
A call is one of a stream of calls (core/stream.py).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mptrain.core import stream
from mptrain.core.host import thread_count
from mptrain.core.progress import Progress, progress
from mptrain.recipe import Latency

Timed = Callable[[dict[str, np.ndarray]], Any]
MIN_ROUNDS = 5


def latency(
    ids: Sequence[str],
    runner: Callable[[str, int], Timed],
    example: Callable[[int, int], Mapping[str, Any]],
    cfg: Latency,
    *,
    has_length: bool = True,
    budget_s: float = 180.0,
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Median and minimum wall time of one call, in milliseconds, per variant and setting.

    Args:
        ids: the variants.
        runner: makes the callable of a variant for a number of threads, which is fixed when
            a model is compiled. All variants of one thread count are alive together.
        example: inputs of exactly (batch, length), real ones.
        cfg: the grid; "all" threads are those this process may use.
        has_length: False for images: the keys then lack the length, `b1_t1`.
        budget_s: seconds for the whole grid. Slow settings get fewer rounds than `cfg.runs`,
            never fewer than five (or `cfg.runs`, if that is less).

    Returns:
        {id: {"b1_s128_t1": {"median": 4.1, "min": 4.0, "runs": 15}}}
    """
    result: dict[str, dict[str, dict[str, float | int]]] = {variant: {} for variant in ids}
    if not ids:
        return result
    grid = settings(cfg, has_length)
    left = len(cfg.threads) * len(grid)
    deadline = time.monotonic() + budget_s
    with progress("latency", left * cfg.runs, unit="round") as bar:
        for threads in cfg.threads:
            count = thread_count(threads)
            forwards = {variant: runner(variant, count) for variant in ids}
            for batch, length, name in grid:
                inputs = {n: np.asarray(value) for n, value in example(batch, length).items()}
                share = max(0.0, deadline - time.monotonic()) / left
                left -= 1
                times = rounds(forwards, inputs, cfg.runs, time.monotonic() + share, bar)
                for variant, seconds in times.items():
                    milliseconds = [1e3 * s for s in seconds]
                    result[variant][f"{name}_t{threads}"] = {
                        "median": statistics.median(milliseconds),
                        "min": min(milliseconds),
                        "runs": len(milliseconds),
                    }
    return result


def settings(cfg: Latency, has_length: bool) -> list[tuple[int, int, str]]:
    """(batch, length, name) of the grid, but for the threads. has_length: False for images, whose names lack it."""
    if not has_length:
        return [(batch, cfg.length[0], f"b{batch}") for batch in cfg.batch]
    return [(batch, length, f"b{batch}_s{length}") for batch in cfg.batch for length in cfg.length]


def rounds(
    forwards: Mapping[str, Timed], inputs: dict[str, np.ndarray], count: int, deadline: float, bar: Progress
) -> dict[str, list[float]]:
    """Seconds of each call, by variant, of `count` rounds or as many as begin before the deadline, at least
    MIN_ROUNDS."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        turns = stream.rounds([partial(_timed, forward, inputs) for forward in forwards.values()])
        found = [next(turns)]
        bar.update()
        while len(found) < count:
            if len(found) >= MIN_ROUNDS and time.monotonic() > deadline:
                bar.update(count - len(found))
                break
            found.append(next(turns))
            bar.update()
    finally:
        if collecting:
            gc.enable()
    return {variant: list(times) for variant, times in zip(forwards, zip(*found, strict=True), strict=True)}


def _timed(forward: Timed, inputs: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    forward(inputs)
    return time.perf_counter() - start
