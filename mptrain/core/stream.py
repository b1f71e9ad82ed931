"""A timed call is one of a stream of calls, as OpenVINO's benchmark_app and MLPerf's single stream time it.

Where models take turns, a turn finds the weights of the model before it in the caches, which a service of one model
never meets. So calls are made untimed before a timed one. Their number was measured on a Zen 4 core after a model of
86 MB: 5.4, 4.7, 4.55, 4.5, then 4.48 milliseconds of every later call of one of 5 MB; 11.0, 10.6, then 10.5 of one of
22 MB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

# Seconds, and calls at most, that warm the caches. A longer call is its own warm-up: none.
_WARM_S, _WARM_CALLS, _LONG_CALL_S = 0.025, 10, 0.1


def rounds(calls: Sequence[Callable[[], float]], *, warm: bool = True) -> Iterator[list[float]]:
    """Of each round, without end, the seconds that one call of each gave; the calls take turns in going first.

    warm: untimed calls before each timed one, which is then one of a stream of calls.
    """
    for call in calls:
        call()  # the first call allocates and picks kernels
    untimed = [calls_to_warm(call()) if warm else 0 for call in calls]
    for number in itertools.count():
        first, seconds = number % len(calls), [0.0] * len(calls)
        for index in [*range(first, len(calls)), *range(first)]:
            for _ in range(untimed[index]):
                calls[index]()
            seconds[index] = calls[index]()
        yield seconds


def calls_to_warm(seconds: float) -> int:
    """Untimed calls before a timed one. seconds: what one takes."""
    return 0 if seconds >= _LONG_CALL_S else min(_WARM_CALLS, math.ceil(_WARM_S / max(seconds, 1e-6)))
