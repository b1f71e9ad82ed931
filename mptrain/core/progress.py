"""How far long work is: a bar on a terminal, elsewhere (a log file) a line every half minute.

The lines come from a thread of their own, because work may stay inside one call for minutes (the conversion
of a model, one layer of GPTQ). Work inside other work speaks for both: only the innermost prints.

    for layer in track(layers, "compress"): …
    with progress("export ov_int8"): …                          # nothing to count: the time so far
    with progress("test dense_fp32", len(rows)) as bar: … bar.update(64)
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY = 30.0
"""seconds"""

T = TypeVar("T")
_running: list[Progress] = []


class Progress:
    """What `progress` yields."""

    def __init__(self, label: str, total: int | None, done: int, unit: str) -> None:
        self.label = label
        self.total = total
        self.done = self.first = done
        self.unit = unit
        self.note = ""
        self.begun = time.monotonic()
        self.bar: Any = None

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)

    def say(self, note: str) -> None:
        """Words beside the numbers from now on, such as the loss."""
        self.note = note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)

    def line(self) -> str:
        """compress: weight 12 of 84, 17.50 s a weight, 21.0 min left"""
        seconds = time.monotonic() - self.begun
        parts = [f"{self.unit} {self.done} of {self.total}".strip()] if self.total is not None else []
        parts += [self.note] if self.note else []
        if self.total is None or self.done == self.first:
            parts.append(f"{_time(seconds)} so far")
        else:
            each = seconds / (self.done - self.first)
            parts += [f"{each:.2f} s a {self.unit}"] if self.unit else []
            parts.append(f"{_time(each * (self.total - self.done))} left")
        return f"{self.label}: {', '.join(parts)}"


@contextmanager
def progress(
    label: str, total: int | None = None, *, done: int = 0, unit: str = "", shown: bool = True
) -> Iterator[Progress]:
    """Say how far the body is. total: what `update` counts to; None where nothing can be counted.

    done: what was done before, in a run that continues. unit: the word before the count. shown: False says nothing.
    """
    found = Progress(label, total, done, unit)
    if not shown:
        yield found
        return
    terminal = sys.stderr.isatty()
    if terminal:
        form = None if total is not None else "{desc}: {elapsed}{postfix}"
        unit = unit or "it"
        found.bar = tqdm(total=total, desc=label, initial=done, unit=unit, bar_format=form, leave=False)
    ended = threading.Event()
    every = 1.0 if terminal else LINE_EVERY
    speaker = threading.Thread(target=_speak, args=(found, ended, every), name="progress", daemon=True)
    _running.append(found)
    speaker.start()
    try:
        yield found
    finally:
        ended.set()
        _running.remove(found)
        if found.bar is not None:
            speaker.join()  # or it would draw the bar again
            found.bar.close()


def track(items: Sequence[T] | Iterable[T], label: str, total: int | None = None, *, shown: bool = True) -> Iterator[T]:
    """The items, with progress. total: their number where they have no length."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress(label, total, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()


def _speak(found: Progress, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        if found.bar is not None:
            found.bar.refresh()
        elif _running and _running[-1] is found:
            log.info(found.line())


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min" if seconds < 5400 else _hours(seconds)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"
