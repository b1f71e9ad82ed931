"""Torch models to ONNX: exported by torch, compressed weights stored as their integers, half where it is safe.

torch.export    fp32, free axes symbolic; fake quantizers of activations as one operation each
torch.onnx      opset 23: attention is one operation; every node knows its node of the torch graph
weights         records of int8 and int4 as DequantizeLinear or MatMulNBits (weights.py)
half            all values float16 but for the operations that a search keeps in float32 (half.py)
save            model.onnx, and model.onnx.data beside it where the file would pass 2 GB

What is a file: parts.py. Keys and values of a cache are float16 in an fp16 file, unless something that makes them
stays in float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers the operations that torch.onnx knows
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.weights import records
from mptrain.core.disk import size
from mptrain.core.errors import ExportError, UserError
from mptrain.core.recurrence import Step, replaced
from mptrain.core.signature import Forward, Signature, probed, without_cache
from mptrain.export.base import Embeddings
from mptrain.export.onnx import half as onnx_half
from mptrain.export.onnx import recurrence, weights
from mptrain.export.onnx.operations import lacking
from mptrain.export.onnx.parts import Part, parts_of
from mptrain.export.onnx.runner import CachedSession, opened
from mptrain.export.torch import arguments, graphs
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.token_by_token import check
from mptrain.export.torch.traceable import dtype_of, traceable_masks
from mptrain.recipe.exports.onnx import OPSET
from mptrain.verify import overflow, parity

IGNORED = {"avg_pool2d": {"divisor_override"}, "cross_entropy_loss": {"label_smoothing"}}
"""arguments that torch's ONNX functions do not read"""
MASKED = -3e4  # added to scores that do not count: finite in fp16 even with a score beside it
LEVELS = ((0, 255), (-128, 127))
DECOMPOSED = torch.ops.quantized_decomposed
LARGEST = 1_800_000_000
"""bytes of weights in the file itself; protobuf's limit is 2 GiB for all of it"""


@dataclass(frozen=True)
class Exported:
    """path: of an encoder and a decoder, the decoder's. size_bytes: of all files. half: JSON facts of `half.find`."""

    path: Path
    size_bytes: int
    half: dict[str, Any] | None = None


def write(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    embeddings: Embeddings = "fp32",
    calibration: Sequence[Mapping[str, Tensor]] = (),
    signature: Signature | None = None,
    cache: int | None = None,
) -> Exported:
    """Write model.onnx into a folder that exists; of an encoder and a decoder that reads tokens, a file to each.

    model: float32, plain, with records, or with fake quantizers; it is not changed. example: inputs by name, at
    least 2 examples of 2 tokens. signature: its free axes stay free, its outputs are those of the file; default what
    running the model tells. embeddings: of a model with fake quantizers. cache: of a causal LM, the tokens of the
    longest text: the file then has keys and values as inputs and outputs, and has been compared token by token with
    itself and with the model. None: it reads whole texts.
    calibration: for fp16, batches on which the operations that stay in fp32 are found, and the file is checked;
    default: the example. Inputs and outputs are float32 in an fp16 file too.
    Raises UserError when model and arguments do not fit, ExportError when the conversion fails or an fp16 file is
    wrong on the calibration batches.
    """
    if dtype_of(model) != torch.float32:
        raise UserError(f"ONNX export: the model is {dtype_of(model)}; give the float32 model (model.float())")
    signature = probed(model, example) if signature is None else signature
    quantized = quantizers.is_quantized(model)
    if quantized:
        from mptrain.compress.quantize.integers import activations_only

        if precision == "fp16":
            raise UserError("ONNX export: fp16 of a model with quantizers; detach them first (quantizers.detach)")
        model = activations_only(model, embeddings=embeddings, stands=_QuantizeDequantize)
    training = model.training
    try:
        return _write(
            model.eval(), example, folder, precision, list(calibration) or [example], signature, cache, quantized
        )
    finally:
        model.train(training)


def _write(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    precision: str,
    batches: Sequence[Mapping[str, Tensor]],
    signature: Signature,
    cache: int | None,
    quantized: bool,
) -> Exported:
    """model: in eval mode, with what it computes as it is. Other arguments as of `write`."""
    stored: set[str] = set()
    halves: dict[str, dict[str, Any]] = {}
    for part in parts_of(model, example, signature, cached=cache is not None):
        graph, program = converted(model, part)
        if precision == "fp16":
            facts, reach = onnx_half.find(program, part, batches)
            halves[part.file] = facts | {"scaled": onnx_half.cast(graph, program, facts["kept_fp32"], reach)}
        stored |= weights.store(graph, records.of(model))
        save(graph, folder / part.file)
    weights.check_stored(records.of(model), stored)
    half = onnx_half.together(halves) if halves else None
    path = folder / part.file
    if cache is not None or half is not None:
        with closing(opened(path, cache)) as runner:
            if isinstance(runner, CachedSession):
                check(runner, model, runtime="onnxruntime", exact=precision == "fp32" and not quantized)
            if half is not None:
                _check_half(half, model, runner, batches, signature)
    return Exported(path, size(folder), half)


def _check_half(
    found: dict[str, Any], model: nn.Module, runner: Forward, batches: Sequence[Mapping[str, Tensor]], call: Signature
) -> None:
    """The fp16 file itself on the calibration batches; found gets what that gave. Raises ExportError."""
    executed = parity.executed(model, runner, batches, call)
    found["executed"] = overflow.as_json(executed)
    if not executed.right():
        raise ExportError(
            f"the fp16 file of {type(model).__name__} is wrong on the calibration batches: {found['executed']}."
            " Export it as fp32"
        )


def converted(model: nn.Module, part: Part) -> tuple[ir.Model, ExportedProgram]:
    """The graph in memory, and the torch graph that its nodes name. model: that the part is of, for messages. Raises
    ExportError."""
    program: ExportedProgram | None = None
    try:
        shown = partial(part.module, *(part.example[name] for name in part.ports.input_names))
        with (
            torch.no_grad(),
            _quiet(),
            traceable_masks(MASKED),
            without_cache(model),
            real_arithmetic(model, shown),
            replaced(part.module, recurrence.stand_in) as steps,
        ):
            program = _traced(model, part)
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=part.ports.input_names,
                output_names=part.ports.output_names,
                optimize=False,  # its rewriting of rotary embeddings gives files that onnxruntime refuses
                verbose=False,
            )
            assert made is not None
            recurrence.lower(made.model, steps, _cell)
    except ExportError:
        raise
    except Exception as error:
        if program is not None:
            _check_operations(model, program)  # torch names the first that lacks
        raise ExportError(
            f"torch could not export {type(model).__name__} to ONNX: {str(error).strip()[-600:]}. If its forward pass"
            " depends on the values of its inputs, or has an operation that ONNX lacks, rewrite that part; else report"
            " it with the model's config.json."
        ) from error
    assert made.exported_program is not None
    graph = made.model
    optimizer.fold_constants(graph)
    optimizer.remove_unused_nodes(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.DeduplicateInitializersPass()(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.ShapeInferencePass()(graph)  # every value has a type afterwards
    _name_axes(graph, part.ports)
    return graph, made.exported_program


def check_convertible(model: nn.Module, example: Mapping[str, Tensor], signature: Signature, *, cached: bool) -> None:
    """What `converted` would refuse, but for what torch.onnx itself does; weights do not matter. Raises ExportError."""
    with torch.no_grad(), _quiet(), traceable_masks(MASKED), without_cache(model):
        for part in parts_of(model, example, signature, cached=cached):
            with replaced(part.module, recurrence.stand_in):
                _check_operations(model, _traced(model, part))


def _cell(step: Step) -> ir.Model:
    program = torch.export.export(step.cell, step.example(), dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}))
    arguments.check(program, "ONNX", None, IGNORED)
    made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert made is not None
    optimizer.fold_constants(made.model)  # which makes splits of sequences, and does so outside of loops alone
    optimizer.remove_unused_nodes(made.model)
    return made.model


def _traced(model: nn.Module, part: Part) -> ExportedProgram:
    """Raises ExportError that names arguments of operations that ONNX's converter does not read."""
    axes = tuple(dict.fromkeys(port.free, Dim.DYNAMIC) for port in part.ports.inputs)
    values = tuple(part.example[name] for name in part.ports.input_names)
    program, _ = graphs.export(model, part.module.eval(), values, (axes,))
    arguments.check(program, "ONNX", None, IGNORED)
    return program


def _check_operations(model: nn.Module, program: ExportedProgram) -> None:
    """Raises ExportError that names all operations that ONNX lacks."""
    if missing := lacking(program):
        raise ExportError(
            f"ONNX export: {type(model).__name__} has operations that ONNX lacks: {', '.join(missing)}. Write them with"
            " others, or use another format"
        )


def save(graph: ir.Model, path: Path) -> None:
    """Write the file, and the weights beside it where they are too many for one."""
    graph.producer_name = "mptrain"
    held = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if held > LARGEST else None)


def _name_axes(graph: ir.Model, signature: Signature) -> None:
    """Free axes carry the words of the signature instead of torch's s48, and what shape inference made up no name: a
    tool that infers shapes again makes up the same ones, and takes axes of one name to be of one size."""
    words: dict[str | None, str] = {}
    for value, port in zip(graph.graph.inputs, signature.inputs):
        assert value.shape is not None
        words |= {str(value.shape[place]): word for place, word in port.free.items()}
    for value in [*graph.graph.inputs, *graph.graph.outputs, *(v for n in graph.graph.all_nodes() for v in n.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else _axis(str(d), words) for d in value.shape])


def _axis(name: str, words: Mapping[str | None, str]) -> str | None:
    return words.get(name, None if name.startswith("unk__") else name)


class _QuantizeDequantize(nn.Module):
    """A fake quantizer of activations as the two operations that become QuantizeLinear and DequantizeLinear."""

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__()
        frozen = quantizer.frozen()
        if frozen.axis is not None or frozen.levels not in LEVELS:
            raise UserError(
                f"ONNX export: activations quantized to {frozen.levels}, {len(frozen.step)} scales; it holds one scale"
                f" and the levels {' or '.join(map(str, LEVELS))}"
            )
        self.scale, zero = frozen.single
        self.zero = zero - frozen.levels[0]  # unsigned: onnxruntime's kernels on x86 want it, and it changes nothing

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.zero, 0, 255, torch.uint8)
        return DECOMPOSED.dequantize_per_tensor(DECOMPOSED.quantize_per_tensor(x, *grid), *grid)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's log and its warnings of functions that it will not have."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
