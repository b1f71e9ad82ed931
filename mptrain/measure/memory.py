"""Memory that a piece of work adds to this process: the most that was resident meanwhile, less what was before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Added:
    """bytes: None where the system does not tell (it is Linux that does)."""

    bytes: int | None = None


@contextmanager
def added() -> Iterator[Added]:
    """What is freed before is given back to the system first, so that it is not used again unseen."""
    found = Added()
    gc.collect()
    _give_back()
    try:
        _RESET.write_text("5")  # the peak begins anew (proc(5))
        before = _resident("VmRSS")
    except (OSError, KeyError):
        yield found
        return
    yield found
    found.bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(lines[field].split()[0])


def _give_back() -> None:
    """Freed memory that the C library keeps; others than glibc's have no such function."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
