"""Reading a saved ML program: its operations, and its constants as they are stored.

An .mlpackage holds a protobuf (the operations) and a weight file (the large constants). The
operations are taken from the protobuf as they are, with the names in the file; only the
decoding of a single value is coremltools' own (`_load_value` and its blob reader, private:
pinned by the versions in `CoreMl.packages` and by tests that compare with known weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools import proto
from coremltools.converters.mil.frontend.milproto.load import TranscriptionContext, _load_value
from torch import Tensor

from mptrain.core.errors import UserError
from mptrain.mil.features import Feature, feature

FLOATS = ("FLOAT16", "FLOAT32")
Value = Any  # a Tensor, a Python scalar, a string, or a list of them


@dataclass(frozen=True)
class Result:
    """An output of an operation; shape has None where it is flexible."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Name:
    """A reference to the result of another operation, or to an input."""

    name: str


@dataclass(frozen=True)
class Operation:
    """inputs: by parameter, each a list of references and literal values, in order."""

    type: str
    inputs: dict[str, list[Value]]
    results: tuple[Result, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def name(self) -> str:
        return self.results[0].name if self.results else self.type

    def uses(self) -> set[str]:
        found = {value.name for values in self.inputs.values() for value in values if isinstance(value, Name)}
        for block in self.blocks:
            found |= block.uses()
        return found


@dataclass(frozen=True)
class Block:
    """inputs: of the blocks of a while_loop, what the loop carries."""

    inputs: tuple[Result, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def uses(self) -> set[str]:
        return set(self.outputs).union(*(operation.uses() for operation in self.operations))


@dataclass(frozen=True)
class Program:
    """One function of a package. constants: by name, decoded (see `decode`). states: shape and dtype by name."""

    inputs: tuple[Feature, ...]
    states: dict[str, Result]
    main: Block
    constants: dict[str, Value]
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By name of a constant, or OPERATION.PARAMETER: the stored type ("UINT4") and its number of elements."""
    specification: int = 0

    def operations(self) -> Iterator[Operation]:
        """All of them, those in nested blocks after the operation that holds them."""
        todo = list(reversed(self.main.operations))
        while todo:
            operation = todo.pop()
            yield operation
            todo.extend(inner for block in reversed(operation.blocks) for inner in reversed(block.operations))

    def values(self) -> dict[str, Result]:
        """By name: what operations make, and what their blocks are given."""
        found = {result.name: result for op in self.operations() for result in op.results}
        return found | {r.name: r for op in self.operations() for block in op.blocks for r in block.inputs}

    @property
    def outputs(self) -> tuple[Result, ...]:
        by_name = self.values()
        return tuple(by_name[name] for name in self.main.outputs)


def read_program(package: Path | str, function: str = "main") -> Program:
    """Raises UserError for what is not a package with an ML program, is damaged, or has no such function."""
    package = Path(package)
    try:
        spec = ct.utils.load_spec(str(package))
    except Exception as error:
        raise UserError(f"{package}: not a Core ML package ({error}); give the path of an .mlpackage") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise UserError(f"{package}: a {spec.WhichOneof('Type')} model, not an ML program; convert it to mlprogram")
    functions = spec.mlProgram.functions
    if function not in functions:
        raise UserError(f"{package}: no function {function!r}; it has {sorted(functions)}")
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    reader = _Reader(TranscriptionContext(str(weights)))
    found = functions[function]
    try:
        return _program(spec, found, reader)
    except Exception as error:  # of coremltools' reader: RuntimeError, ValueError, KeyError, struct.error, …
        raise UserError(
            f"{package}: its program or weights cannot be read ({type(error).__name__}: {error}): it is damaged or not"
            " whole. Copy the whole folder again, or export the model again."
        ) from error


def _program(spec: Any, found: Any, reader: _Reader) -> Program:
    main = reader.block(found.block_specializations[found.opset])
    described = {item.name: item.type for item in spec.description.input}
    inputs, states = [], {}
    for argument in found.inputs:
        if argument.type.WhichOneof("type") == "stateType":
            states[argument.name] = _result(argument.name, argument.type.stateType.wrappedType)
        else:
            taken = _result(argument.name, argument.type)
            inputs.append(feature(taken.name, taken.dtype, taken.shape, described.get(argument.name)))
    return Program(tuple(inputs), states, main, reader.constants, reader.stored, spec.specificationVersion)


class _Reader:
    def __init__(self, context: TranscriptionContext):
        self.context = context
        self.constants: dict[str, Value] = {}
        self.stored: dict[str, tuple[str, int]] = {}

    def block(self, spec: Any) -> Block:
        operations = [self.operation(op) for op in spec.operations]
        kept = tuple(operation for operation in operations if operation is not None)
        return Block(tuple(_result(value.name, value.type) for value in spec.inputs), kept, tuple(spec.outputs))

    def operation(self, spec: Any) -> Operation | None:
        results = tuple(_result(output.name, output.type) for output in spec.outputs)
        if spec.type == "const":
            value = spec.attributes["val"]
            self.constants[results[0].name] = decode(_load_value(self.context, value))
            self.stored[results[0].name] = _stored_type(value)
            return None
        inputs: dict[str, list[Value]] = {}
        for parameter, value in spec.attributes.items():  # constexpr operations before iOS 18
            if parameter != "name":
                inputs[parameter] = [decode(_load_value(self.context, value))]
                self.stored[f"{results[0].name}.{parameter}"] = _stored_type(value)
        for parameter, argument in spec.inputs.items():
            inputs[parameter] = [self._binding(binding) for binding in argument.arguments]
            if results and [b.WhichOneof("binding") for b in argument.arguments] == ["value"]:
                self.stored[f"{results[0].name}.{parameter}"] = _stored_type(argument.arguments[0].value)
        return Operation(spec.type, inputs, results, tuple(self.block(block) for block in spec.blocks))

    def _binding(self, binding: Any) -> Value:
        if binding.WhichOneof("binding") == "name":
            return Name(binding.name)
        return self._literal(binding.value)

    def _literal(self, value: Any) -> Value:
        if value.type.WhichOneof("type") == "listType":  # the labels of a classifier
            return [self._literal(item) for item in value.immediateValue.list.values]
        return decode(_load_value(self.context, value))


def decode(value: Any) -> Value:
    """Floats become float32 tensors, integers int64, scalars tensors of no axes; strings stay."""
    if isinstance(value, str | dict):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return [str(item) for item in array.ravel()]
    kind = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(kind)).reshape(array.shape))


def _stored_type(value: Any) -> tuple[str, int]:
    if value.type.WhichOneof("type") != "tensorType":
        return "OTHER", 1
    kind = value.type.tensorType
    return _dtype(kind.dataType), int(np.prod([d.constant.size for d in kind.dimensions], dtype=np.int64))


def _dtype(number: int) -> str:
    return proto.MIL_pb2.DataType.Name(number)


def _result(name: str, kind: Any) -> Result:
    if kind.WhichOneof("type") != "tensorType":
        return Result(name, kind.WhichOneof("type") or "none", ())
    axes = (d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in kind.tensorType.dimensions)
    return Result(name, _dtype(kind.tensorType.dataType), tuple(axes))


def is_float(dtype: str) -> bool:
    return dtype in FLOATS


def as_tensor(value: Tensor | np.ndarray) -> Tensor:
    """A batch value in the types that the interpreter computes with."""
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()
