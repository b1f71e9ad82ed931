"""The smallest set of operations to keep in fp32 so that a program is right in fp16.

    reference    every op in fp32: the outputs, and the range of every op's values
    half         every op in fp16: is it wrong? NaN alone is not the test: x² = inf in an RMSNorm gives zeros
    candidates   ops that overflow (|x| > 65504 in fp32, or where inf or NaN first arises in fp16) and their
                 direct consumers; where fp32 for these does not help, ops that underflow too; then every op
    drop         candidates go back to fp16, in groups of halving size, while the outputs stay right
    verify       what is left, on all batches

A backend is a `Program`: it runs a batch with some ops in fp32 and the rest in fp16. The set is minimal in
that no single op of it can be dropped; delta debugging (Zeller, Hildebrandt 2002) finds it in about
2 k log2(n) runs for k of n candidates.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-14
"""least normal fp16, 6.1e-5; below it precision is lost"""
HALF_LEAST = 2.0**-24
"""least fp16 above 0, 6.0e-8; half of it and less rounds to 0"""
MAX_ERROR = 0.05
"""of a row of an output, relative to its norm; a cosine of 0.999"""
MIN_UNDERFLOW = 1e-3
"""fraction of an op's values that fp16 makes 0, from which on the op is suspected"""

Watch = Callable[[str, Tensor], None]
"""called with the name of an op and each floating tensor that it made, in order"""


@dataclass(frozen=True)
class Op:
    """An operation with floating results. Constants, views and integer operations are none.

    name: unique. kind: what it does, "mul". module: of the source model, "" where it has none.
    inputs: the ops whose floating results it reads, also through views.
    """

    name: str
    kind: str
    module: str
    inputs: tuple[str, ...]


class Program(Protocol):
    """A model with calibration batches, computed op by op.

    An op in fp16 rounds its floating operands (inputs, weights, constants) and its results to fp16 and
    computes in between in fp32, as devices do; an op in fp32 does neither. So a value is
    rounded where an fp16 op reads it, as a cast there would. Rounding is to nearest, beyond 65504 to inf.
    """

    @property
    def ops(self) -> Sequence[Op]:
        """In order of execution; the same for every batch."""
        ...

    @property
    def batches(self) -> int: ...

    def run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        """Outputs of one batch by name, with the ops named in `keep` in fp32 and all others in fp16.

        Each output is [..., d] floating; rows that do not count (padding) are left out. `watch` sees each
        op's results as its readers get them (rounded, if the op is in fp16).
        """
        ...


@dataclass(frozen=True)
class Range:
    """Values of one op over all batches, in fp32. Fractions are of the values that are finite and not 0."""

    largest: float
    """|x|; infinite ones are not counted"""
    overflow: float
    zero: float
    """made 0 by fp16"""
    subnormal: float
    """below 6.1e-5, with those made 0"""


@dataclass(frozen=True)
class Difference:
    """Outputs against the fp32 reference, the worst of all batches and outputs.

    error: largest |a - b|₂ / max(|b|₂, its root mean square over rows), over rows; cosine: of whole outputs.
    """

    finite: bool
    cosine: float
    max_diff: float
    error: float

    def right(self, max_error: float = MAX_ERROR) -> bool:
        return self.finite and self.error <= max_error


@dataclass(frozen=True)
class Found:
    """keep: names of ops, in order. casts: values that change between fp32 and fp16, once each.

    before, after: with every op in fp16, and with `keep` in fp32; `after` is within the limit.
    """

    keep: tuple[str, ...]
    casts: int
    before: Difference
    after: Difference
    ranges: Mapping[str, Range]
    reasons: Mapping[str, str]
    runs: int
    seconds: float


def search(program: Program, *, max_error: float = MAX_ERROR, suspects: Collection[str] = ()) -> Found:
    """Find the ops to keep in fp32.

    suspects: ops to try first with those that overflow, e.g. because they did in training.
    """
    begun = time.monotonic()
    trial = _Trial(program, max_error)
    ranges = trial.ranges
    before = trial.difference(())
    keep: list[str] = []
    if not before.right(max_error):
        for candidates in _tiers(program, trial, suspects):
            if trial.right(candidates):
                keep = _drop(candidates, trial.right)
                break
    after = trial.difference(keep) if keep else before
    return Found(
        tuple(keep),
        casts(program.ops, keep),
        before,
        after,
        ranges,
        {op.name: reason(op, ranges) for op in program.ops if op.name in keep},
        trial.runs,
        time.monotonic() - begun,
    )


def described(found: Found) -> dict[str, Any]:
    """JSON facts: what stays in fp32 and why, and the outputs against fp32 without (all_half) and with that (kept).

    A difference that is not finite is None.
    """
    return {
        "kept_fp32": dict(found.reasons),
        "casts": found.casts,
        "all_half": as_json(found.before),
        "kept": as_json(found.after),
        "runs": found.runs,
        "seconds": found.seconds,
    }


def as_json(difference: Difference) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(difference).items()}


def casts(ops: Iterable[Op], keep: Collection[str]) -> int:
    """Values made in one of the precisions and read in the other."""
    keep = set(keep)
    return len(
        {(source, op.name in keep) for op in ops for source in op.inputs if (source in keep) != (op.name in keep)}
    )


def reason(op: Op, ranges: Mapping[str, Range]) -> str:
    """Why an op was kept, in a few words."""
    found = ranges[op.name]
    if found.largest > HALF_MAX:
        return f"largest |x| {found.largest:.3g}"
    read = max((ranges[name].largest for name in op.inputs), default=0.0)
    if read > HALF_MAX:
        return f"reads |x| up to {read:.3g}"
    if found.zero > MIN_UNDERFLOW:
        return f"{100 * found.zero:.2g}% of its values become 0"
    return "reads or makes values that fp16 does not hold"


class _Trial:
    """Runs of the program, compared with its fp32 outputs."""

    def __init__(self, program: Program, max_error: float) -> None:
        self.program, self.max_error = program, max_error
        self.runs = 0
        self._first = 0  # the batch that failed last is tried first
        meters = {op.name: _Meter() for op in program.ops}
        everything = set(meters)
        self.reference = [
            self._run(batch, everything, lambda op, value: meters[op].add(value)) for batch in range(program.batches)
        ]
        self.ranges = {name: meter.range() for name, meter in meters.items()}
        self.broken = {name: meter.broken for name, meter in meters.items()}

    def _run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        self.runs += 1
        return self.program.run(batch, keep, watch)

    def right(self, keep: Collection[str]) -> bool:
        for batch in sorted(range(self.program.batches), key=lambda b: b != self._first):
            if not compare(self.reference[batch], self._run(batch, set(keep))).right(self.max_error):
                self._first = batch
                return False
        return True

    def difference(self, keep: Collection[str]) -> Difference:
        return worst(compare(self.reference[b], self._run(b, set(keep))) for b in range(self.program.batches))

    def spoilers(self) -> set[str]:
        """Ops with more values that are not finite than in fp32, which read none from such an op."""
        counts: Counter[str] = Counter()

        def watch(op: str, value: Tensor) -> None:
            counts[op] += _broken(value)

        for batch in range(self.program.batches):
            self._run(batch, (), watch)
        bad = {op for op, count in counts.items() if count > self.broken[op]}
        return {op.name for op in self.program.ops if op.name in bad and not bad.intersection(op.inputs)}


def _tiers(program: Program, trial: _Trial, suspects: Collection[str]) -> Iterable[list[str]]:
    """Candidates, more and more of them; each tier in the order in which they are best dropped."""
    overflowing = {name for name, r in trial.ranges.items() if r.largest > HALF_MAX}
    overflowing |= trial.spoilers() | set(suspects)
    yield _with_consumers(program.ops, overflowing)
    underflowing = {name for name, r in trial.ranges.items() if r.zero > MIN_UNDERFLOW}
    yield _with_consumers(program.ops, overflowing | underflowing)
    yield [op.name for op in reversed(program.ops)]


def _with_consumers(ops: Sequence[Op], wanted: set[str]) -> list[str]:
    """Consumers first, the last ones before: the op where a value arises is the better one to keep."""
    consumers = [op.name for op in ops if op.name not in wanted and wanted.intersection(op.inputs)]
    return consumers[::-1] + [op.name for op in reversed(ops) if op.name in wanted]


def _drop(candidates: Sequence[str], right: Callable[[Collection[str]], bool]) -> list[str]:
    """A part of `candidates`, in reverse order, that is right, of which no single element can be dropped."""
    kept = list(candidates)
    size = (len(kept) + 1) // 2
    while size:
        start, before = 0, len(kept)
        while start < len(kept):
            less = kept[:start] + kept[start + size :]
            if right(less):
                kept = less
            else:
                start += size
        size = min(size // 2, len(kept)) if size > 1 else int(len(kept) < before)
    return kept[::-1]


class _Meter:
    """Range of values that come in pieces."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.broken = 0
        self.counts = torch.zeros(4, dtype=torch.int64)  # of values other than 0, too large, made 0, subnormal

    def add(self, value: Tensor) -> None:
        x = value.detach().abs()
        broken = _broken(x)
        self.broken += broken
        if broken:
            x = torch.where(torch.isfinite(x), x, 0.0)
        if x.numel():
            self.largest = max(self.largest, float(x.max()))
            nonzero = int(torch.count_nonzero(x))
            zeros = x.numel() - nonzero
            large, lost, small = (
                int(torch.count_nonzero(b)) for b in (x > HALF_MAX, x <= HALF_LEAST / 2, x < HALF_TINY)
            )
            self.counts += torch.tensor([nonzero, large, lost - zeros, small - zeros])

    def range(self) -> Range:
        total, *parts = self.counts.tolist()
        return Range(self.largest, *(part / max(total, 1) for part in parts))


def _broken(value: Tensor) -> int:
    return value.numel() - int(torch.count_nonzero(torch.isfinite(value)))


def compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Difference:
    """Over all outputs; where the reference is not finite nothing is compared."""
    return worst(_difference(expected[name].double(), got[name].double()) for name in expected)


def worst(differences: Iterable[Difference]) -> Difference:
    found = list(differences)
    return Difference(
        all(d.finite for d in found),
        min((d.cosine for d in found), default=1.0),
        max((d.max_diff for d in found), default=0.0),
        max((d.error for d in found), default=0.0),
    )


def _difference(expected: Tensor, got: Tensor) -> Difference:
    known = torch.isfinite(expected)
    if not torch.isfinite(got[known]).all():
        return Difference(False, 0.0, float("inf"), float("inf"))
    width = expected.shape[-1] if expected.dim() else 1
    a, b = (torch.where(known, x, 0.0).reshape(-1, width) for x in (expected, got))
    if not a.numel():
        return Difference(True, 1.0, 0.0, 0.0)
    norms = a.norm(dim=1)
    floor = norms.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    errors = (a - b).norm(dim=1) / norms.clamp_min(floor)
    lengths = a.norm() * b.norm()
    cosine = float((a * b).sum() / lengths) if lengths > 0 else float(bool((a == b).all()))
    return Difference(True, cosine, float((a - b).abs().max()), float(errors.max()))
