"""A reference interpreter of saved Core ML programs: what an .mlpackage computes, on any machine.

Every operation is computed in float32 and, where its result is float16, rounded to float16
once. "stored" rounds what the package declares float16; "fp32" nothing; "fp16" computes every
operation as if it were float16, operands rounded too, whatever the package declares.
This is an emulation: see LIMITS for what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import ExportError, UserError
from mptrain.mil.constants import CONSTANTS
from mptrain.mil.layout import LAYOUT
from mptrain.mil.math import MATH
from mptrain.mil.program import Block, Name, Operation, Program, Value, as_tensor, read_program

Rounding = Literal["stored", "fp32", "fp16"]
LookUp = Callable[[Value, dict[str, Value]], Value]
OPERATIONS = MATH | LAYOUT
CONTROL = ("cond", "while_loop", "read_state", "write_state")
LIMITS = (
    "An emulation in float32, rounded to float16 once per operation. It cannot tell: which operations run on the"
    " Neural Engine, GPU or CPU; how a device accumulates sums (float16 accumulation can overflow or lose digits"
    " inside a matmul, convolution, softmax or normalization that is whole here); whether subnormal float16 numbers"
    " are flushed to zero; speed, memory, and whether a device accepts the package at all."
)
TINY = 2.0**-24  # the smallest float16 above zero
NORMAL = 2.0**-14  # the smallest with all its digits
ROUNDS = 100_000  # of a loop; one that needs more is taken for endless, as rounding can make it


@dataclass
class Record:
    """Of one operation, over all its results and batches.

    largest: max |x| of the finite values. nan, infinite, zeroed, subnormal: counts of values;
    zeroed ones are not zero but become zero in float16, subnormal ones lose digits there.
    """

    name: str
    type: str
    dtype: str
    largest: float = 0.0
    nan: int = 0
    infinite: int = 0
    zeroed: int = 0
    subnormal: int = 0
    values: int = 0

    def update(self, exact: Tensor, kept: Tensor) -> None:
        """exact: results before rounding, which largest, zeroed and subnormal count; kept: after it."""
        size = exact.abs()
        finite = size.isfinite()
        self.values += size.numel()
        self.nan += int(kept.isnan().sum())
        self.infinite += int(kept.isinf().sum())
        known = size[finite]
        if known.numel():
            self.largest = max(self.largest, float(known.max()))
        self.zeroed += int(((known > 0) & (known <= TINY / 2)).sum())
        self.subnormal += int(((known > TINY / 2) & (known < NORMAL)).sum())


class Interpreter:
    """A package as a function of named inputs.

    package: path of an .mlpackage. rounding: see the module. keep_fp32: names of operations
    that are not rounded. State lives in `state` (float16 values, by name) from one
    call to the next; `reset` zeroes it.
    Raises UserError for a file that is no ML program, ExportError that lists all operations
    that are not supported.
    """

    def __init__(
        self,
        package: Path | str,
        rounding: Rounding = "stored",
        *,
        keep_fp32: Collection[str] = (),
        function: str = "main",
    ):
        self.package, self.rounding = Path(package), rounding
        self.program: Program = read_program(package, function)
        self.keep_fp32 = frozenset(keep_fp32)
        missing = unsupported(self.program)
        if missing:
            raise ExportError(
                f"{self.package}: mptrain verify does not know these operations:"
                f" {', '.join(f'{name} ({count}×)' for name, count in missing.items())}. Everything else is supported."
            )
        self.inputs = [feature.name for feature in self.program.inputs]
        self.outputs = list(self.program.main.outputs)
        self.record: dict[str, Record] | None = None
        self.observe: Callable[[str, Tensor], None] | None = None  # called with each float result as it is kept
        self.alone: dict[str, Callable[[str, Tensor, Tensor], None]] = {}
        """by name of an operation: called with it, its float result and the same of operands and result in float16"""
        self._constants, self._body = self._fold()
        self._halves: dict[str, Tensor] = {}
        self._last_use = _last_uses(self._body, self.program.main.outputs)
        self.reset()

    def reset(self) -> None:
        self.state = {name: torch.zeros([n or 1 for n in result.shape]) for name, result in self.program.states.items()}

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32, int32 or bool, the label of a classifier as text or a number. Inputs that the
        package does not have are dropped; pictures are arrays of pixels, 0 to 255."""
        lacking = [name for name in self.inputs if name not in batch]
        if lacking:
            raise UserError(f"{self.package} needs the inputs {self.inputs}, the batch lacks {lacking}")
        values: dict[str, Value] = {}
        for feature in self.program.inputs:
            value = as_tensor(batch[feature.name])
            if not feature.accepts(tuple(value.shape)):
                raise UserError(f"{self.package}: an input of shape {list(value.shape)}; the package takes {feature}")
            half = _is_float(value) and feature.dtype == "FLOAT16" and self.rounding != "fp32"
            values[feature.name] = _half(value) if half else value
        with torch.no_grad():
            self._run(self._body, values, self._last_use)
        found = {name: self._look_up(Name(name), values) for name in self.outputs}
        return {name: _array(value) for name, value in found.items()}

    def records(self, batches: Iterable[Mapping[str, Tensor | np.ndarray]]) -> list[Record]:
        """One record to each operation with float results, in order, over all batches."""
        self.record = {}
        try:
            for batch in batches:
                self(batch)
            return list(self.record.values())
        finally:
            self.record = None

    def _fold(self) -> tuple[dict[str, Value], tuple[Operation, ...]]:
        """Decompress the constants once; what is left depends on inputs."""
        constants: dict[str, Value] = dict(self.program.constants)
        for operation in self.program.operations():
            if operation.type not in CONSTANTS:
                continue
            arguments = {name: self._argument(values, constants) for name, values in operation.inputs.items()}
            results = CONSTANTS[operation.type](**arguments)
            for result, value in zip(operation.results, results if isinstance(results, tuple) else (results,)):
                constants[result.name] = _half(value) if result.dtype == "FLOAT16" else value
        return constants, tuple(op for op in self.program.main.operations if op.type not in CONSTANTS)

    def _run(self, operations: tuple[Operation, ...], values: dict[str, Value], last: dict[int, list[str]]) -> None:
        for index, operation in enumerate(operations):
            if operation.type in CONSTANTS:  # in a block: decompressed already
                continue
            results = self._results(operation, values)
            for result, value in zip(operation.results, results):
                rounded = self._rounded(value, operation.name, result.dtype)
                if _is_float(value):
                    if self.record is not None:
                        row = Record(operation.name, operation.type, result.dtype)
                        self.record.setdefault(operation.name, row).update(value, rounded)
                    if self.observe is not None:
                        self.observe(operation.name, rounded)
                values[result.name] = rounded
            for name in last.get(index, ()):
                values.pop(name, None)

    def _results(self, operation: Operation, values: dict[str, Value]) -> tuple[Value, ...]:
        if operation.type in CONTROL:
            return tuple(getattr(self, f"_{operation.type}")(operation, values))
        exact = self.rounding != "fp16" or operation.name in self.keep_fp32
        found = self._computed(operation, values, self._look_up if exact else self._look_up_half)
        if operation.name in self.alone and _is_float(found[0]):
            half = self._computed(operation, values, self._look_up_half)
            self.alone[operation.name](operation.name, found[0], _half(half[0]))
        return found

    def _computed(self, operation: Operation, values: dict[str, Value], look_up: LookUp) -> tuple[Value, ...]:
        arguments = {name: self._argument(found, values, look_up) for name, found in operation.inputs.items()}
        try:
            found = OPERATIONS[operation.type](**arguments)
        except Exception as error:
            shapes = {n: list(v.shape) for n, v in arguments.items() if isinstance(v, Tensor) and v.dim()}
            raise ExportError(
                f"{self.package}: {operation.type} {operation.name!r} with {shapes} fails:"
                f" {type(error).__name__}: {error}"
            ) from error
        return found if isinstance(found, tuple) else (found,)

    def _read_state(self, operation: Operation, values: dict[str, Value]) -> list[Value]:
        return [self.state[operation.inputs["input"][0].name]]

    def _write_state(self, operation: Operation, values: dict[str, Value]) -> list[Value]:
        value = self._argument(operation.inputs["data"], values)
        self.state[operation.inputs["input"][0].name] = _half(value) if self.rounding != "fp32" else value
        return []

    def _cond(self, operation: Operation, values: dict[str, Value]) -> list[Value]:
        chosen = bool(self._argument(operation.inputs["pred"], values))
        return self._block(operation.blocks[0 if chosen else 1], [], values)

    def _while_loop(self, operation: Operation, values: dict[str, Value]) -> list[Value]:
        found = operation.inputs["loop_vars"]
        carried = [self._look_up(value, values) for value in found]
        condition, body = operation.blocks
        for _ in range(ROUNDS):
            if not bool(self._block(condition, carried, values)[0]):
                return carried
            carried = self._block(body, carried, values)
        raise ExportError(
            f"{self.package}: the loop {operation.name!r} still runs after {ROUNDS} rounds with {self.rounding}"
            " rounding; a counter in float16 stops at 2048: count in integers, or export the model as fp32."
        )

    def _block(self, block: Block, arguments: list[Value], values: dict[str, Value]) -> list[Value]:
        inner = values | dict(zip((given.name for given in block.inputs), arguments))
        self._run(block.operations, inner, {})
        return [self._look_up(Name(name), inner) for name in block.outputs]

    def _argument(self, found: list[Value], values: dict[str, Value], look_up: LookUp | None = None) -> Value:
        resolved = [(look_up or self._look_up)(value, values) for value in found]
        return resolved[0] if len(resolved) == 1 else resolved

    def _look_up(self, value: Value, values: dict[str, Value]) -> Value:
        if not isinstance(value, Name):
            return value
        if value.name in values:
            return values[value.name]
        if value.name not in self._constants:
            raise UserError(f"{self.package}: nothing makes the value {value.name!r}; the package is damaged.")
        return self._constants[value.name]

    def _look_up_half(self, value: Value, values: dict[str, Value]) -> Value:
        found = self._look_up(value, values)
        if not _is_float(found):
            return found
        if not isinstance(value, Name) or value.name in values:
            return _half(found)
        if value.name not in self._halves:  # constants are rounded once
            self._halves[value.name] = _half(found)
        return self._halves[value.name]

    def _rounded(self, value: Value, name: str, dtype: str) -> Value:
        """name: of the operation that made the value."""
        if not _is_float(value) or name in self.keep_fp32 or self.rounding == "fp32":
            return value
        return _half(value) if self.rounding == "fp16" or dtype == "FLOAT16" else value


def unsupported(program: Program) -> dict[str, int]:
    """How often each unknown operation occurs."""
    known = OPERATIONS.keys() | CONSTANTS.keys() | set(CONTROL)
    types = [operation.type for operation in program.operations()]
    return {name: types.count(name) for name in sorted(set(types) - known)}


def weights(program: Program) -> Iterator[tuple[Operation, dict[str, tuple[str, int]]]]:
    """The compressed constants, with the stored type and number of elements of each of their parts."""
    for operation in program.operations():
        if operation.type in CONSTANTS:
            parts = {}
            for parameter, values in operation.inputs.items():
                name = values[0].name if isinstance(values[0], Name) else f"{operation.name}.{parameter}"
                if name in program.stored:
                    parts[parameter] = program.stored[name]
            yield operation, parts


def _last_uses(operations: tuple[Operation, ...], outputs: Collection[str]) -> dict[int, list[str]]:
    """By index of an operation: the values that nothing needs after it."""
    last: dict[str, int] = {}
    for index, operation in enumerate(operations):
        for name in operation.uses() | {result.name for result in operation.results}:
            last[name] = index
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in outputs:
            found.setdefault(index, []).append(name)
    return found


def _half(value: Tensor) -> Tensor:
    return value.to(torch.float16).float()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _array(value: Value) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    array = value.numpy()
    return array.astype(np.int32) if array.dtype == np.int64 else array
