"""Whether half precision pays on a device: a matrix product and the model's forward, timed against fp32 in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.precision.half import in_half
from mptrain.precision.policy import DTYPES, Compute

ROUNDS = 7
SECONDS = 10.0
"""that rounds take at most, but for the first"""
FORWARD_S = 0.25
"""that a forward in fp32 may take, or it has fewer rows: without half kernels it can take a hundred times as long"""
_PAYS = 1.1


@dataclass(frozen=True)
class Speed:
    """Medians over alternating rounds. ratio: fp32 time over half time, above 1 where half is faster."""

    what: str
    compute: str
    fp32_ms: float
    half_ms: float

    @property
    def ratio(self) -> float:
        return self.fp32_ms / self.half_ms

    @property
    def pays(self) -> bool:
        return self.ratio >= _PAYS


def measure(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    computes: Sequence[Compute],
    keep_fp32: Mapping[Compute, Sequence[str]],
) -> list[Speed]:
    """A product of the shape of the largest linear layer, and a forward, for each compute dtype.

    model: fp32, on the device to be timed. keep_fp32: by compute dtype. A dtype that an operation lacks on this
    device raises RuntimeError, as torch does.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    batch = _first(batch, _rows(model, batch, device))
    found = []
    weight = max((m.weight for m in model.modules() if isinstance(m, nn.Linear)), key=Tensor.numel, default=None)
    if weight is not None:
        rows = min(4096, max(v.shape[:2].numel() for v in batch.values() if v.dim()))
        x = torch.randn(rows, weight.shape[1], device=device)
        calls = {"fp32": _product(x, weight)}
        calls |= {c: _product(x.to(DTYPES[c]), weight.detach().to(DTYPES[c])) for c in computes}
        found += _ratios(f"product {rows}x{weight.shape[1]}x{weight.shape[0]}", calls, device)
    models = {"fp32": model} | {c: in_half(model, keep_fp32.get(c, ()), c) for c in computes}
    size = "x".join(map(str, next(iter(batch.values())).shape))
    return found + _ratios(f"forward {size}", {c: _forward(m, batch) for c, m in models.items()}, device)


@torch.no_grad()
def _rows(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> int:
    """As many of the batch as take FORWARD_S, at least one."""
    call = _forward(model, _first(batch, 1))
    call()
    once = _timed(call, device)
    return max(1, min(max(len(v) for v in batch.values() if v.dim()), int(FORWARD_S / once)))


def _first(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] if value.dim() else value for name, value in batch.items()}


def _product(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: x @ weight.T


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**batch)


@torch.no_grad()
def _ratios(what: str, calls: Mapping[str, Callable[[], object]], device: torch.device) -> list[Speed]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    once = sum(_timed(call, device) for call in calls.values())
    for _ in range(max(1, min(ROUNDS, int(SECONDS / once)))):
        for name, call in calls.items():
            times[name].append(_timed(call, device))
    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return [Speed(what, name, medians["fp32"], ms) for name, ms in medians.items() if name != "fp32"]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun
