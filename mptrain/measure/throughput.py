"""Throughput of all variants side by side: examples a second with several requests in flight.

Latency asks how long one caller waits; a server asks how many it serves. So each variant is compiled for throughput,
its runtime chooses how many requests run at once, and all of them are kept busy for a while:

    examples a second = batch · calls / seconds

As for latency (latency.py), the variants take turns in an order that rotates, and the median over the rounds counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from mptrain.core.host import thread_count
from mptrain.core.progress import progress
from mptrain.measure.latency import MIN_ROUNDS, rounds, settings
from mptrain.recipe import Latency

ROUND_S = 0.25
"""seconds for which a variant is kept busy, at least"""
MIN_CALLS = 4
"""to a request in a round: fewer would mostly time the first and the last of them"""


class Stream(Protocol):
    """An exported model with several requests in flight."""

    requests: int
    """how many at once, as the runtime chose"""

    def __call__(self, batch: Mapping[str, np.ndarray], calls: int) -> None:
        """Compute the batch `calls` times; returns when all of them are done."""
        ...

    def close(self) -> None:
        """Free what it holds. Further calls are errors."""
        ...


def throughput(
    ids: Sequence[str],
    stream: Callable[[str, int], Stream],
    example: Callable[[int, int], Mapping[str, Any]],
    cfg: Latency,
    *,
    has_length: bool = True,
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Examples a second per variant and setting: {id: {"b1_s128_t1": {"median", "max", "requests", "runs"}}}.

    ids: the variants. stream: makes one of a variant for a number of threads; all of one thread count are alive
    together. example: inputs of exactly (batch, length), real ones. cfg: the grid, of at most MIN_ROUNDS rounds.
    has_length: False for images. requests: how many were in flight.
    """
    result: dict[str, dict[str, dict[str, float | int]]] = {variant: {} for variant in ids}
    if not ids:
        return result
    count = min(cfg.runs, MIN_ROUNDS)
    grid = settings(cfg, has_length)
    with progress("throughput", len(grid) * len(cfg.threads) * count, unit="round") as bar:
        for threads in cfg.threads:
            streams = {variant: stream(variant, thread_count(threads)) for variant in ids}
            try:
                for batch, length, name in grid:
                    inputs = {n: np.asarray(value) for n, value in example(batch, length).items()}
                    calls = {variant: _calls(streams[variant], inputs) for variant in ids}
                    busy = {variant: partial(streams[variant], calls=calls[variant]) for variant in ids}
                    for variant, seconds in rounds(busy, inputs, count, math.inf, bar).items():
                        rates = [batch * calls[variant] / s for s in seconds]
                        result[variant][f"{name}_t{threads}"] = {
                            "median": statistics.median(rates),
                            "max": max(rates),
                            "requests": streams[variant].requests,
                            "runs": len(rates),
                        }
            finally:
                for held in streams.values():
                    held.close()
    return result


def _calls(stream: Stream, inputs: dict[str, np.ndarray]) -> int:
    """That keep it busy for ROUND_S."""
    some = MIN_CALLS * stream.requests
    stream(inputs, calls=some)  # the first call at a new shape allocates and picks kernels
    begun = time.perf_counter()
    stream(inputs, calls=some)
    each = (time.perf_counter() - begun) / some
    return max(some, math.ceil(ROUND_S / each))
