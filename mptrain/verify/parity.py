"""Whether an exported model computes what the torch model computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.errors import ExportError, NotFinite
from mptrain.core.signature import Batch, Forward, Outputs, Signature, probed, without_cache
from mptrain.data.tasks.agreement import decisions
from mptrain.recipe import Gates
from mptrain.verify import overflow
from mptrain.verify.outputs import rows

log = logging.getLogger(__name__)

Agreement = Callable[[Outputs, Outputs, Batch], np.ndarray]
"""(expected, got, inputs) to a number in 0..1 for each decision"""


MEASURED, ROUNDED = 5e-5, 1e-2
"""it is asked whether rounding explains a difference above the one of the output's size, and below the other of its
size or of 1, for an output may be the little that is left of large values"""
ORDERS = 4
"""times the error of one computation in float32; the difference of two is at most twice it, each a sample of few"""
CHOSEN = 0.5
"""share of the integers of an exact export that must be the model's"""
_AT_A_TIME = 2**19  # values, of which float64 has several copies


@torch.no_grad()
def executed(
    model: nn.Module, runner: Forward, batches: Iterable[Mapping[str, Tensor]], signature: Signature
) -> overflow.Difference:
    """The worst of all batches, of an exported model that rounds against the float32 one; arguments as of `compare`."""
    found = []
    for batch in batches:
        with without_cache(model):
            expected = rows(signature.call(model, batch), batch, signature)
        found.append(overflow.compare(expected, rows(runner(batch), batch, signature)))
    return overflow.worst(found)


@torch.no_grad()
def compare(
    model: nn.Module,
    runner: Forward,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    signature: Signature | None = None,
    agreement: Agreement | None = None,
    exact: bool = True,
) -> dict[str, Any]:
    """Differences over all outputs of all batches.

    model: torch model, evaluated as it is on its device. runner: the exported model, a function from
    inputs by name to arrays by name. batches: inputs without labels, padded, that nothing of the export was tuned on.
    signature: which outputs count, and which of their places are padding and not compared; default what running the
    model tells. agreement: of the task, default whether the argmax of the last axis is the same, or, of outputs
    without one, the order of the examples.
    exact: whether the export should compute what the model does to the last digits, which fp16 and integers do not.
    Returns {"max_abs_diff", "relative", "rounding", "mean_abs_diff", "agreement", "examples", "numbers"}; numbers:
    whether there were outputs with differences at all, and not chosen classes or tokens alone; relative: the largest
    difference of an output over its largest value in the batch. Of an exact export less what two orders of summation
    may differ by (`_rounding`, looked at from MEASURED to ROUNDED, where it would fail without; as rounding in the same
    measure; where nobody can tell, outputs below 1 count as of size 1). For quantized models agreement says more than
    the differences. Raises ExportError when an output is missing or has another shape, NotFinite for values
    that are not finite.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    apart, examples = _Apart(), 0
    alike: list[np.ndarray] = []

    def add(batch: Mapping[str, Tensor], signature: Signature) -> None:  # its outputs are gone before the next's come
        with without_cache(model):
            ours = signature.run(model, {name: value.to(device) for name, value in batch.items()})
        theirs = runner(batch)
        _check_outputs(ours, theirs, exact)
        if agreement is not None:
            alike.append(agreement({name: v.float().cpu().numpy() for name, v in ours.items()}, theirs, dict(batch)))
        elif not any(value.is_floating_point() for value in ours.values()):
            alike.extend((value.cpu().numpy() == theirs[name]).reshape(-1) for name, value in ours.items())
        expected = rows(ours, batch, signature)
        del ours  # logits of a batch are some 200 MB, and these are copies where there is padding
        got = rows(theirs, batch, signature)
        del theirs
        if agreement is None and expected:
            alike.append(decisions(expected, got))
        apart.add(expected, got, cache(partial(_rounding, model, batch, signature)) if exact else None)

    for batch in batches:
        signature = probed(model, batch) if signature is None else signature
        add(batch, signature)
        examples += len(next(iter(batch.values())))
    model.train(training)
    return {
        "max_abs_diff": apart.largest,
        "relative": apart.relative,
        "rounding": apart.rounding,
        "mean_abs_diff": apart.total / max(apart.values, 1),
        "agreement": float(np.concatenate(alike).mean()) if any(map(len, alike)) else 0.0,
        "examples": examples,
        "numbers": apart.values > 0,
    }


@dataclass
class _Apart:
    """The differences of all batches so far, as `compare` returns them."""

    largest: float = 0.0
    relative: float = 0.0
    rounding: float = 0.0
    total: float = 0.0
    values: int = 0

    def add(
        self, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], errors: Callable[[], dict[str, float]] | None
    ) -> None:
        """errors: `_rounding` of the batch, asked for where it may matter; None where it does not. Raises NotFinite."""
        for name, wanted in expected.items():
            if bad := int((~got[name].isfinite()).sum()):
                raise NotFinite(
                    f"output {name}: {bad} of {got[name].numel()} values of the exported model are not finite"
                )
            furthest, summed = furthest_of(got[name], wanted.cpu())
            size, noise = size_of(wanted), 0.0
            if errors is not None and MEASURED * size < furthest < ROUNDED * max(1.0, size):
                noise = ORDERS * errors().get(name, 0.0)
                size = size if name in errors() else max(1.0, size)
            self.largest = max(self.largest, furthest)
            self.relative = max(self.relative, max(0.0, furthest - noise) / size)
            self.rounding = max(self.rounding, noise / size)
            self.total += summed
            self.values += wanted.numel()


def _check_outputs(ours: Mapping[str, Tensor], theirs: Mapping[str, np.ndarray], exact: bool) -> None:
    """Raises ExportError for an output that is missing, has another shape or, of integers of an exact export, mostly
    others."""
    missing = [name for name in ours if name not in theirs]
    if missing:
        raise ExportError(f"the exported model has the outputs {list(theirs)}, and lacks {missing} of the model's")
    for name, value in ours.items():
        if theirs[name].shape != tuple(value.shape):
            raise ExportError(
                f"output {name}: the exported model gives {theirs[name].shape}, the model {tuple(value.shape)}"
            )
        if exact and not value.is_floating_point():
            _check_chosen(name, value, theirs[name])


def judged(difference: Mapping[str, Any], *, exact: bool) -> dict[str, Any]:
    """{"judged_by", "limit", "passed"} of what `compare` found, by the default gates: parity of an exact export, else
    agreement. What gives choices alone has no differences, so agreement judges it too."""
    exact = exact and difference["numbers"]
    bound = Gates().parity if exact else Gates().agreement
    assert bound is not None
    return {
        "judged_by": "parity" if exact else "agreement",
        "passed": difference["relative"] <= bound if exact else difference["agreement"] >= bound,
        "limit": bound,
    }


def _check_chosen(name: str, ours: Tensor, theirs: np.ndarray) -> None:
    """Raises ExportError where an exact export chooses other classes or tokens: few of them may be ties, most not."""
    alike = float((ours.cpu().numpy() == theirs).mean()) if theirs.size else 1.0
    if alike < CHOSEN:
        raise ExportError(
            f"output {name}: the exported model gives what the model does in {100 * alike:.0f}% of the places alone"
        )


def furthest_of(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest, and the sum of all; in float64, and of few rows at a time, for logits are large."""
    largest = total = 0.0
    for ours, theirs in zip(wanted.flatten().split(_AT_A_TIME), got.flatten().split(_AT_A_TIME), strict=True):
        apart = (theirs.double() - ours.double()).abs()
        largest, total = max(largest, float(apart.max()) if apart.numel() else 0.0), total + float(apart.sum())
    return largest, total


def size_of(values: Tensor) -> float:
    """The largest finite value; of few at a time, as above."""
    parts = (part.double().abs().nan_to_num_(0.0, 0.0, 0.0) for part in values.flatten().split(_AT_A_TIME))
    return max([torch.finfo(torch.float32).eps, *(float(part.max()) for part in parts if part.numel())])


def _rounding(model: nn.Module, batch: Mapping[str, Tensor], signature: Signature) -> dict[str, float]:
    """By output the largest error of the model in float32, against itself in float64.

    An export sums in another order, so it may be as far from the float32 model as that is from the right value. Empty
    where the model does not compute in float64.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = {name: value.to(device) for name, value in batch.items()}
    try:
        with _in_float64(model), without_cache(model):
            right = signature.call(model, {n: v.double() if v.is_floating_point() else v for n, v in given.items()})
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.debug("%s does not compute in float64: %s", type(model).__name__, error)
        return {}
    with without_cache(model):
        single = rows(signature.call(model, given), batch, signature)
    double = rows(right, batch, signature)
    return {
        name: float((value.cpu().double() - double[name]).abs().nan_to_num(0.0).max()) for name, value in single.items()
    }


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Each module computes with its own parameters and buffers in float64, one after the other, so that a large model
    is never there twice; the way back to float32 changes no bit."""
    handles = []
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own = [tensor for tensor in own if tensor.dtype == torch.float32]
        if own:
            handles.append(module.register_forward_pre_hook(lambda *_, own=own: _cast(own, torch.float64)))
            handles.append(
                module.register_forward_hook(lambda *_, own=own: _cast(own, torch.float32), always_call=True)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(dtype)
