"""Torch models to Core AI assets (`.aimodel`, iOS and macOS 27), and assets executed, on Linux too.

    torch.export     fp32, compressed weights computed from their records (coreai_weights)
    cast             fp16: coreai-opt casts the graph, but for the operations to keep in fp32
    TorchConverter   coreai-torch's operations; unsupported ones are all named at once
    save             <folder>/model.aimodel, with config.json and the processor's files

The runtime in coreai-core's wheel computes on the CPU, so the asset itself is run, not an emulation
of it. What it cannot tell: where an Apple device runs an operation (CPU, GPU, Neural Engine), how that
unit accumulates, and how fast.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mptrain.compress.weights import records
from mptrain.core.disk import size, whole
from mptrain.core.errors import ExportError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.signature import Signature, probed, without_cache
from mptrain.export.coreai import arguments
from mptrain.export.coreai.asset import load
from mptrain.export.coreai.facts import float_casts
from mptrain.export.coreai.runner import Asset
from mptrain.export.torch import graphs
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.traceable import Positional, dtype_of, traceable_masks
from mptrain.verify import overflow, parity
from mptrain.verify.outputs import of_model
from mptrain.verify.programs import exported

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations inside these packages
    from coreai.authoring.asset import AIProgram
    from coreai_torch import TorchConverter, get_decomp_table

    from mptrain.export.coreai.weights import packing, stored

ASSET = "model.aimodel"
MASKED = -3e4  # added to scores that do not count: finite in fp16 even with a score beside it


Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """size_bytes: all files of the asset.

    half: of an fp16 asset, JSON facts: `kept_fp32` (operation: reason), `float_casts` in the file, and with
    calibration batches what overflow.described says, and `executed`: the asset itself, run, against the fp32 model.
    """

    folder: Path
    asset: Path
    size_bytes: int
    half: Mapping[str, Any] | None = None


def export_coreai(
    model: nn.Module, example: Mapping[str, Tensor], folder: Path, *, processor: Any = None, **how: Any
) -> Exported:
    """Write folder/ with model.aimodel, config.json and the processor's files. how: as `write` takes it."""
    with whole(folder, getattr(model, "config", None), processor) as scratch:
        done = write(model, example, scratch, **how)
    return replace(done, folder=folder, asset=folder / ASSET)


def write(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    shapes: Literal["dynamic", "fixed"] = "dynamic",
    calibration: Batches = (),
    few: bool = False,
    keep_fp32: Collection[str] = (),
    signature: Signature | None = None,
) -> Exported:
    """Write model.aimodel into a folder that exists.

    model: plain, float32; weights with records (compress.records) are stored as their integers or tables,
    everything else in the precision. It is not changed.
    example: inputs by name; fixes the asset's inputs and, with shapes "fixed", their shapes. "dynamic" needs at
    least 2 examples of at least 2 tokens, and leaves the free axes of the signature open. signature: also says which
    outputs count; default what running the model tells. Integers are int32 in the asset. A causal LM is exported
    without a cache.
    calibration: for fp16, batches on which the smallest set of operations to keep in fp32 is found, and on
    which the asset is run against the model. `few`: it is run on two of their examples only, for hosts that
    compute fp16 in software.
    keep_fp32: more operations (names in the graph of `traced`) or modules of an fp16 asset that compute in fp32.
    Raises UserError when model and arguments do not fit, ExportError when the conversion fails or when an
    fp16 asset is wrong on the calibration batches.
    """
    if is_quantized(model):
        raise UserError(
            "Core AI export of a model with quantizers: detach them first and attach the records of its"
            " integers (compress.records)"
        )
    if precision != "fp16" and (keep_fp32 or calibration):
        raise UserError(f"Core AI export: keep_fp32 and calibration are for precision fp16, got {precision}")
    check_float32(model)
    signature = probed(model, example) if signature is None else signature
    graph = traced(model, example, signature, shapes=shapes)
    half: dict[str, Any] | None = None
    if precision == "fp16":
        expected = of_model(model, calibration, signature)
        half = _to_half(graph, signature, calibration, expected, keep_fp32)
    done = save(converted(graph, model, signature.input_names, signature.output_names), folder)
    if half is None:
        return done
    half["float_casts"] = float_casts(load(done.asset).program)
    if calibration:
        batches = [_smallest(calibration)] if few else calibration
        with closing(Asset(done.asset)) as runner:
            executed = parity.executed(model, runner, batches, signature)
        examples = sum(len(next(iter(batch.values()))) for batch in batches)
        half["executed"] = overflow.as_json(executed) | {"examples": examples}
        if not executed.right():
            raise ExportError(
                f"the fp16 asset of {type(model).__name__} is wrong on the calibration batches: {half}."
                " Export it as fp32, or name more modules in keep_fp32"
            )
    return replace(done, half=half)


def check_float32(model: nn.Module) -> None:
    if dtype_of(model) != torch.float32:
        raise UserError(f"Core AI export: the model is {dtype_of(model)}; give the float32 model (model.float())")


def traced(
    model: nn.Module,
    example: Mapping[str, Tensor],
    signature: Signature,
    *,
    shapes: Literal["dynamic", "fixed"] = "dynamic",
) -> ExportedProgram:
    """The graph that is converted: core ATen operations in fp32, inputs and outputs in the order of the signature."""
    training, held = model.training, records.of(model)
    names = signature.input_names
    wrapper = Positional(model, names, signature.output_names, signature.call).eval()
    axes = _dynamic(example, signature) if shapes == "dynamic" else None
    try:
        shown = partial(signature.call, model, example)
        with (
            torch.no_grad(),
            quiet(),
            traceable_masks(MASKED),
            without_cache(model),
            real_arithmetic(model, shown),
            stored(model, held),
        ):
            values = tuple(example[name] for name in names)
            program, _ = graphs.export(model, wrapper, values, axes)
            program = program.run_decompositions(arguments.table(get_decomp_table()))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export could not trace {type(model).__name__} with {shapes} shapes: {str(error).strip()[-600:]}."
            " If the forward pass depends on the values or the length of its inputs, rewrite that part or use"
            ' shapes "fixed"; else report it with the model\'s config.json.'
        ) from error
    finally:
        model.train(training)
    arguments.check(program)
    return program


def _dynamic(example: Mapping[str, Tensor], signature: Signature) -> tuple[tuple[dict[int, Any], ...]]:
    """The free axes of every input; torch.export finds out which of them are equal."""
    found = []
    for port in signature.inputs:
        small = [place for place in port.free if example[port.name].shape[place] < 2]
        if small:
            raise UserError(
                f"Core AI export with dynamic shapes: input {port.name} is {tuple(example[port.name].shape)}; a size of"
                " 1 would stay fixed, so give an example of at least 2 rows and 2 tokens"
            )
        found.append(dict.fromkeys(port.free, torch.export.Dim.DYNAMIC))
    return (tuple(found),)


def _to_half(
    graph: ExportedProgram,
    signature: Signature,
    calibration: Batches,
    expected: Sequence[Mapping[str, Tensor]],
    keep_fp32: Collection[str],
) -> dict[str, Any]:
    """Cast in place; returns Exported.half. expected: to each batch what the model gives."""
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    kept: dict[str, str] = {}
    for wanted in keep_fp32:
        named = [n.name for n in operations if n.name == wanted or _inside(n, wanted)]
        if not named:
            raise UserError(f"Core AI export: keep_fp32 {wanted!r} is no operation and no module of the exported graph")
        kept |= dict.fromkeys(named, "asked for")
    facts: dict[str, Any] = {}
    if calibration:
        ops = exported.GraphOps(graph, signature.input_names, signature.output_names, calibration, signature)
        found = overflow.search(ops, suspects=list(kept), reference=expected)
        kept |= found.reasons
        facts = overflow.described(found) | {"casts": overflow.casts(ops.ops, kept)}
    stays = exported.with_copies(graph, kept)
    with quiet():
        from coreai_opt.casting import cast_fp32_to_fp16  # here, for it imports torchao, which takes seconds

        cast_fp32_to_fp16(graph, ignored_ops=lambda node: node.name in stays)
    more = exported.in_fp32(graph.graph.nodes) - kept.keys()  # coreai-opt's own choice
    return facts | {"kept_fp32": kept | dict.fromkeys(sorted(more), "reads a number that fp16 does not hold")}


def _inside(node: fx.Node, name: str) -> bool:
    found = exported.module(node)
    return found == name or found.startswith(f"{name}.")


def _smallest(batches: Batches) -> Mapping[str, Tensor]:
    """Two examples of the batch with the least values to an example."""
    least = min(batches, key=lambda batch: sum(value[0].numel() for value in batch.values()))
    return {name: value[:2] for name, value in least.items()}


def converted(
    graph: ExportedProgram, model: nn.Module, inputs: list[str], outputs: list[str], states: Sequence[str] = ()
) -> AIProgram:
    """The program of a decomposed export; states: names of the buffers that it changes, in order."""
    try:
        with quiet(), packing():
            converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)  # no source paths in the asset
            converter.add_exported_program(graph, input_names=inputs, output_names=outputs, state_names=states)
            return converter.to_coreai()
    except Exception as error:
        raise ExportError(
            f"coreai-torch could not convert {type(model).__name__}: {str(error).strip()[-800:]}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the packages' banner and warnings."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def save(program: AIProgram, folder: Path) -> Exported:
    """Write model.aimodel into a folder that exists."""
    program.save_asset(folder / ASSET)
    return Exported(folder, folder / ASSET, size(folder / ASSET))
