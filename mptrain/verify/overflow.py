"""The smallest set of operations to keep in fp32 so that a program is right in fp16.

    reference    every op in fp32: the outputs, and the range of every op's values
    half         every op in fp16: is it wrong? NaN alone is not the test: x² = inf in an RMSNorm gives zeros
    candidates   ops that overflow (|x| > 65504 in fp32, or where inf or NaN first arises in fp16) and their
                 direct consumers; where fp32 for these does not help, ops that underflow too; then every op
    drop         candidates go back to fp16 while the outputs stay right (fewest.py), those first that do the
                 least harm alone; on the batch that fp16 changes most, and on others that turn out wrong
    verify       what is left, on all batches

A backend is a `Program`: it runs a batch with some ops in fp32 and the rest in fp16. In a small program no single op
of the set can be dropped. In a large one that would take hundreds of runs: ops that do the same in its layers are
judged together, in some 30 runs. A limit of time ends the dropping with the smallest set that was right on all batches.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mptrain.core.errors import ExportError
from mptrain.core.progress import Progress, progress
from mptrain.core.signature import Batch, rows_of
from mptrain.verify.difference import MAX_ERROR, Difference, as_json, compare, worst
from mptrain.verify.fewest import fewest
from mptrain.verify.outputs import Kept
from mptrain.verify.ranges import HALF_MAX, Meter, Range, broken_in

MIN_UNDERFLOW = 1e-3
"""fraction of an op's values that fp16 makes 0, from which on the op is suspected"""
MAX_CONVERTED = 1e-3
"""of a row of an output of a converted program in fp32, relative to its norm"""
SECONDS = 60.0
"""for dropping candidates"""
ONE_BY_ONE = 20_000
"""ops to compute, of all trials that drop a single op, up to which each of them is made"""
PASS = 2.5e11
"""products of a weight and a token in one run of all calibration inputs: some 10 s of a core"""

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

    def harm(self, batch: int, ops: Collection[str]) -> Mapping[str, float]:
        """`Difference.error` of the results of each op in fp16 on the values of fp32; no entry where unknown."""
        ...


@dataclass(frozen=True)
class Found:
    """keep: names of ops, in order. casts: values that change between fp32 and fp16, once each.

    before, after: with every op in fp16, and with `keep` in fp32; `after` is within the limit.
    note: why a smaller set may do, "" where no single op of it can be dropped.
    """

    keep: tuple[str, ...]
    casts: int
    before: Difference
    after: Difference
    ranges: Mapping[str, Range]
    reasons: Mapping[str, str]
    runs: int
    seconds: float
    note: str = ""


def search(
    program: Program,
    *,
    max_error: float = MAX_ERROR,
    suspects: Collection[str] = (),
    reference: Sequence[Mapping[str, Tensor]] | None = None,
    seconds: float = SECONDS,
) -> Found:
    """Find the ops to keep in fp32.

    suspects: ops to try first with those that overflow, e.g. because they did in training. reference: to each batch
    what the program should give in fp32, of a model that it was converted from; default what it gives. seconds: after
    which the smallest set that was found right is taken (`note` says so).
    Raises ExportError where the program in fp32 is not the reference.
    """
    begun = time.monotonic()
    with progress("fp16 search") as bar:
        trial = _Trial(program, max_error, bar, reference)
        before = trial.difference(())
        keep: list[str] = []
        note = ""
        if not before.right(max_error):
            for candidates in _tiers(program, trial, suspects):
                if trial.difference(candidates).right(max_error):
                    keep, note = _drop(program, trial, candidates, seconds, begun)
                    break
        after = trial.difference(keep)
    return Found(
        tuple(keep),
        casts(program.ops, keep),
        before,
        after,
        trial.ranges,
        {op.name: reason(op, trial.ranges) for op in program.ops if op.name in keep},
        trial.runs,
        time.monotonic() - begun,
        note,
    )


def _drop(
    program: Program, trial: _Trial, candidates: list[str], seconds: float, begun: float
) -> tuple[list[str], str]:
    """(the candidates that are left, `Found.note`). begun: when the search did."""
    harm, alike = trial.harm(candidates), _alike(program.ops)
    late = large = False
    batches = [trial.hardest]

    def right(keep: list[str]) -> bool:
        nonlocal late
        late = late or time.monotonic() - begun > seconds
        return not late and trial.right(keep, batches)

    def one_by_one(count: int) -> bool:
        nonlocal large
        large = count * len(program.ops) > ONE_BY_ONE
        return not large

    best = candidates
    while True:
        kept = fewest(candidates, right, harm=harm, alike=alike, one_by_one=one_by_one)
        wrong = trial.wrong(kept, batches)
        if wrong is None:
            best = kept
        if wrong is None or late:
            break
        batches.append(wrong)  # and once more: the trials of the batches before are known
    if late:
        return best, f"the search was stopped after {seconds:.0f} s: fewer operations may be enough"
    return best, "operations that are alike were judged together: fewer may be enough" if large else ""


def enough(parameters: int, tokens: int, most: int, products: float = PASS) -> int:
    """Examples of so many tokens to search on: as many as a run makes so many products for, at least 2. A large model
    needs fewer, for it has more layers of each kind. tokens: 1 for inputs of another kind."""
    return max(2, min(most, int(products / max(1, parameters * tokens))))


def some(batches: Sequence[Batch], parameters: int, text: bool, products: float = PASS) -> list[Batch]:
    """The first of the batches with `enough` examples. text: whether they are tokens."""
    counts = list(itertools.accumulate(map(rows_of, batches)))
    tokens = max(value.shape[1] for value in batches[0].values()) if text else 1
    wanted = enough(parameters, tokens, counts[-1], products)
    return list(batches[: 1 + next(place for place, count in enumerate(counts) if count >= wanted)])


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
        "note": found.note,
    }


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
    """Runs of the program, compared with the reference. No run is made twice."""

    def __init__(
        self, program: Program, max_error: float, bar: Progress, reference: Sequence[Mapping[str, Tensor]] | None
    ) -> None:
        self.program, self.max_error, self.bar = program, max_error, bar
        self.runs = 0
        self._known: dict[tuple[int, frozenset[str]], Difference] = {}
        meters = {op.name: Meter() for op in program.ops}
        everything = set(meters)
        own = Kept(lambda batch: dict(self._run(batch, everything)), program.batches)
        self.reference: Sequence[Mapping[str, Tensor]] = own if reference is None else reference
        spoiled: Counter[str] = Counter()

        def count(op: str, value: Tensor) -> None:
            spoiled[op] += broken_in(value)

        found = []
        for batch in range(program.batches):  # all that it is asked, for its outputs may not be kept
            exact = dict(self._run(batch, everything, lambda op, value: meters[op].add(value)))
            if reference is None:
                own.keep(batch, exact)
            else:
                _check_converted(compare(reference[batch], exact))
            del exact
            found.append(self._difference(batch, frozenset(), count))
        self.ranges = {name: meter.range() for name, meter in meters.items()}
        self._spoiled = {name: spoiled[name] - meter.broken for name, meter in meters.items()}
        self.hardest = max(range(program.batches), key=lambda b: (not found[b].finite, found[b].error), default=0)

    def _run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        self.runs += 1
        self.bar.say(f"run {self.runs}, {len(keep)} of {len(self.program.ops)} operations in fp32")
        return self.program.run(batch, keep, watch)

    def _difference(self, batch: int, keep: frozenset[str], watch: Watch | None = None) -> Difference:
        if (batch, keep) not in self._known:
            self._known[batch, keep] = compare(self.reference[batch], self._run(batch, keep, watch))
        return self._known[batch, keep]

    def right(self, keep: Collection[str], batches: Iterable[int]) -> bool:
        chosen = frozenset(keep)
        return all(self._difference(batch, chosen).right(self.max_error) for batch in batches)

    def wrong(self, keep: Collection[str], known: Collection[int]) -> int | None:
        """A batch that is wrong; those known to be right are not run."""
        others = (batch for batch in range(self.program.batches) if batch not in known)
        return next((batch for batch in others if not self.right(keep, [batch])), None)

    def difference(self, keep: Collection[str]) -> Difference:
        return worst(self._difference(batch, frozenset(keep)) for batch in range(self.program.batches))

    def harm(self, ops: Collection[str]) -> dict[str, float]:
        """Of each op alone, on the batch that fp16 changes most."""
        self.runs += 1
        return dict(self.program.harm(self.hardest, set(ops)))

    def spoilers(self) -> set[str]:
        """Ops with more values that are not finite than in fp32, which read none from such an op."""
        bad = {op for op, count in self._spoiled.items() if count > 0}
        return {op.name for op in self.program.ops if op.name in bad and not bad.intersection(op.inputs)}


def _check_converted(found: Difference) -> None:
    """found: in fp32, between a program and the model that it was made from. Raises ExportError."""
    if not found.right(MAX_CONVERTED):
        raise ExportError(
            f"computed in fp32, the converted program is not the model: its outputs differ by up to"
            f" {found.max_diff:.2g} ({found.error:.2g} of their size): the converter takes an"
            " operation for another, and its fp16 form cannot be right either. Export to another format, and report"
            " the model's config.json."
        )


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


def _alike(ops: Sequence[Op]) -> dict[str, Hashable]:
    """By op: its kind and those of its neighbours, and its module without the numbers of layers."""
    kinds = {op.name: op.kind for op in ops}
    readers: dict[str, set[str]] = {}
    for op in ops:
        for source in op.inputs:
            readers.setdefault(source, set()).add(op.kind)
    return {
        op.name: (
            op.kind,
            re.sub(r"\d+", "#", op.module),
            tuple(sorted(kinds[source] for source in op.inputs if source in kinds)),
            tuple(sorted(readers.get(op.name, ()))),
        )
        for op in ops
    }
