"""The runtime that a model is compressed for, as far as a budget in time or bytes asks.

A budget knows no format: it hands models to the runtime, which makes of each what an export would make of it, and it
takes the time of calls in turns. `export/target.py` is the one of runs; without one, torch stands in.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mptrain.core import stream
from mptrain.core.progress import track
from mptrain.core.signature import Batch


class Compiled(Protocol):
    """A model as it will run, with the input it is timed on."""

    bytes: int
    """of the exported model"""

    def seconds(self) -> float:
        """Of one call, see `seconds` below."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Runtime(Protocol):
    words: str
    """for report and log: "OpenVINO int8, 1 thread" """

    def compiled(self, model: nn.Module, example: Batch) -> Compiled:
        """model: any that takes the named tensors; quantizers that the export will have and it lacks are put on a copy.
        It is left as it is. example: one input, batch 1."""
        ...


class Torch:
    """Runs models as they are. threads: None, as torch is set."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self.words = f"torch, {count(self.threads)}"

    def compiled(self, model: nn.Module, example: Batch) -> Compiled:
        return _Eager(model, example, self.threads)


class _Eager:
    def __init__(self, model: nn.Module, example: Batch, threads: int) -> None:
        self.model, self.threads = model, threads
        device = next(model.parameters()).device
        self.example = {name: value.to(device) for name, value in example.items()}
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.no_grad()
    def seconds(self) -> float:
        training, threads = self.model.training, torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.model.eval()
        try:
            return seconds(lambda: self.model(**self.example))
        finally:
            torch.set_num_threads(threads)
            self.model.train(training)

    def close(self) -> None:
        del self.model


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call; of one thread that others kept waiting, its CPU time, which is then the less."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    cpu = time.process_time() - cpu
    return min(time.perf_counter() - wall, cpu or math.inf)


def count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def in_turns(compiled: Sequence[Compiled], count: int, what: str, *, warm: bool = True) -> list[list[float]]:
    """Seconds of each call, by model and round. warm: see core/stream.py."""
    turns = stream.rounds([one.seconds for one in compiled], warm=warm)
    return [list(times) for times in zip(*(next(turns) for _ in track(range(count), what)), strict=True)]


def share(one: Compiled, other: Compiled, rounds: int, what: str) -> float:
    """Time of one model against that of another: the median over rounds of the ratio within a round."""
    mine, its = in_turns([one, other], rounds, what)
    return statistics.median(a / b for a, b in zip(mine, its, strict=True))
