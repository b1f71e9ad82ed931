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
    give_back()
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


def give_back() -> None:
    """Give the system what is freed but held: by cycles, and by the C library (others than glibc cannot)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
