"""A saved float32 package as a `Program` for the search of what must stay in float32, and the names Core ML needs.

Operations that only move values (reshape, transpose, slices) have the precision of what they
move, as Core ML gives them when both sides agree: they are no candidates. Nor are those that repeat a
number, which is a constant: they have the precision of what reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mptrain.core.signature import Signature
from mptrain.mil.interpreter import Interpreter
from mptrain.mil.program import Name, Operation, Value, is_float
from mptrain.verify.difference import of_tensors
from mptrain.verify.outputs import rows
from mptrain.verify.overflow import Op, Watch

VIEWS = frozenset(
    "reshape transpose expand_dims squeeze slice_by_index slice_by_size split tile identity reverse flatten2d".split()
)
FILLS = frozenset(["fill", "fill_like"])


class MilOps:
    """`mptrain.verify.overflow.Program` of a float32 package.

    batches: inputs by name. signature: says what of the outputs is padding and not compared; without one nothing is.
    """

    def __init__(
        self, package: Path, batches: Sequence[Mapping[str, Tensor]], signature: Signature | None = None
    ) -> None:
        self._signature = signature
        self._interpreter = Interpreter(package, "fp16")
        self._batches = batches
        self._source: dict[str, frozenset[str]] = {}  # by value: the ops whose float results it is or shows
        self._views: dict[str, frozenset[str]] = {}
        program = self._interpreter.program
        before = None
        while before != self._source:  # what a loop carries comes from its end too
            before = dict(self._source)
            for operation in program.operations():
                self._follow(operation)
        self._ops = [
            Op(op.name, op.type, "", tuple(sorted(self._read(op) - {op.name})))
            for op in program.operations()
            if _computes(op) and op.name not in self._views
        ]

    def _follow(self, operation: Operation) -> None:
        if operation.blocks:
            self._enter(operation)
        elif _computes(operation):
            number = operation.type in FILLS
            view = number or operation.type in VIEWS or operation.type.startswith("constexpr_")
            made = frozenset() if number else self._read(operation) if view else frozenset([operation.name])
            if view:
                self._views[operation.name] = made
            self._source |= {result.name: made for result in operation.results}

    def _enter(self, operation: Operation) -> None:
        """Core ML leaves the results of loops and branches as they are: they move what is made inside."""
        given = [self._of(value) for value in operation.inputs.get("loop_vars", [])]
        ends = [[self._of(Name(name)) for name in block.outputs] for block in operation.blocks]
        if operation.type == "while_loop":  # its first block is the condition
            ends = [given, ends[1]]
        made = [frozenset().union(*end) for end in zip(*ends)]
        for block in operation.blocks:
            self._source |= {value.name: sources for value, sources in zip(block.inputs, made)}
        self._source |= {result.name: sources for result, sources in zip(operation.results, made)}
        self._views[operation.name] = frozenset().union(*made)

    def _read(self, operation: Operation) -> frozenset[str]:
        return frozenset().union(*(self._of(value) for values in operation.inputs.values() for value in values))

    def _of(self, value: Value) -> frozenset[str]:
        return self._source.get(value.name, frozenset()) if isinstance(value, Name) else frozenset()

    @property
    def ops(self) -> Sequence[Op]:
        return self._ops

    @property
    def batches(self) -> int:
        return len(self._batches)

    def run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        runner = self._interpreter
        runner.keep_fp32 = frozenset(keep) | self._views.keys()
        known = {op.name for op in self._ops}
        runner.observe = None if watch is None else lambda name, value: watch(name, value) if name in known else None
        runner.reset()
        return rows(runner(self._batches[batch]), self._batches[batch], self._signature)

    def harm(self, batch: int, ops: Collection[str]) -> Mapping[str, float]:
        runner = self._interpreter
        found: dict[str, float] = {}

        def see(name: str, exact: Tensor, half: Tensor) -> None:
            found[name] = max(found.get(name, 0.0), of_tensors(exact, half).error)

        runner.keep_fp32 = frozenset(op.name for op in self._ops) | self._views.keys()
        runner.alone = dict.fromkeys(ops, see)
        runner.reset()
        runner(self._batches[batch])
        runner.alone = {}
        return found

    def with_views(self, keep: Collection[str]) -> set[str]:
        """And what moves values of these operations alone: so their casts come where they are read. And numbers that
        these operations alone read."""
        wanted, numbers = set(keep), set[str]()
        operations = list(self._interpreter.program.operations())
        for number in (op for op in operations if op.type in FILLS):
            readers = {op.name for op in operations if number.name in op.uses()}
            if readers and readers <= wanted:
                numbers.add(number.name)
        return wanted | numbers | {name for name, made in self._views.items() if made and made <= wanted}


def _computes(operation: Operation) -> bool:
    return any(is_float(result.dtype) for result in operation.results)


def spellings(name: str) -> set[str]:
    """How a value of a package may be called while it is converted: a file has no names like "348" or "x.1"."""
    plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    unnamed = re.sub(r"^(?:op|var)_(?=\d+$)", "", name)  # what a trace has no name for is a number
    return {name, plain, f"op_{plain}", f"var_{plain}", unnamed, re.sub(r"_(?=\d+$)", ".", name)}
