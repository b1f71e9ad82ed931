"""Torch models to Core ML packages (mlprogram), from torch.export or a trace.

The default route is torch.export with its decompositions switched off: one graph of
functional operations whose lengths are symbols, checked by torch for every length in the
range. A trace records what one example did; it is there for models that torch.export refuses.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import coremltools as ct
import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.disk import size, whole
from mptrain.core.errors import ExportError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.signature import Signature, probed, without_cache
from mptrain.export.coreml import arguments
from mptrain.export.coreml.cache_ops import index_copy
from mptrain.export.coreml.compat import compatible, storing, supported
from mptrain.export.coreml.half import MilOps, spellings
from mptrain.export.coreml.shapes import Axes, axes_of, fitted, flexible, narrowed, sized_inside, tensor_types
from mptrain.export.coreml.weights import constants
from mptrain.export.torch import calls, graphs
from mptrain.export.torch.cached_decoder import CachedDecoder
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.traceable import Positional, traceable_masks
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import CoreMlShapes, CoreMlTarget
from mptrain.verify import overflow
from mptrain.verify.outputs import of_model, rows

PACKAGE = "model.mlpackage"
MASKED = -32752.0  # half the least float16: a score added to it stays finite, and its exponential is zero
Route = Literal["export", "trace"]


@dataclass(frozen=True)
class Exported:
    """size_bytes: of all files in the package. floats: weights that lost their compression, with the reason."""

    folder: Path
    package: Path
    size_bytes: int
    floats: dict[str, str]
    half: dict[str, Any] | None = None


@dataclass(frozen=True)
class Converted:
    """half: of an fp16 package that was checked, the JSON facts of `safe_half`."""

    model: ct.models.MLModel
    floats: dict[str, str]
    half: dict[str, Any] | None = None


def export_coreml(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    processor: Any = None,
    **how: Any,
) -> Exported:
    """Write folder/ with model.mlpackage, config.json and the processor's files. how: as `convert_checked` takes it."""
    return write(
        convert_checked(model, example, **how), folder, config=getattr(model, "config", None), processor=processor
    )


def convert_checked(
    model: nn.Module,
    example: Mapping[str, Tensor],
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    target: CoreMlTarget = "iOS18",
    shapes: CoreMlShapes | None = None,
    route: Route = "export",
    keep_fp32: Collection[str] = (),
    scaled_tables: bool = False,
    calibration: Sequence[Mapping[str, Tensor]] = (),
    signature: Signature | None = None,
) -> Converted:
    """The package in memory, of fp16 with calibration the one that was checked.

    model: a plain model; it is not changed. Weights with a record (mptrain.compress.weights.records)
    are stored as the record's integers or tables. example: inputs by name, of any batch and length.
    signature: says which axes may be flexible, and which outputs count; default what running the model tells.
    keep_fp32: names of MIL operations that an fp16 package computes in float32. calibration: for
    fp16, batches on which the smallest set of such operations is found, and the package is checked.
    Raises UserError for shapes that do not fit, ExportError when the conversion fails, or when an
    fp16 package is wrong on the calibration batches.
    """
    signature = probed(model, example) if signature is None else signature
    into = partial(
        convert,
        model,
        example,
        target=target,
        shapes=shapes,
        route=route,
        scaled_tables=scaled_tables,
        signature=signature,
    )
    if precision == "fp16" and calibration:
        sizes = shapes or CoreMlShapes()
        batches = [fitted(batch, signature, sizes) for batch in calibration]
        return safe_half(into, batches, of_model(model, batches, signature), signature, keep_fp32)
    return into(precision=precision, keep_fp32=keep_fp32)


def convert(
    model: nn.Module,
    example: Mapping[str, Tensor],
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    target: CoreMlTarget = "iOS18",
    shapes: CoreMlShapes | None = None,
    route: Route = "export",
    keep_fp32: Collection[str] = (),
    scaled_tables: bool = False,
    signature: Signature,
    cache: int | None = None,
) -> Converted:
    """The package in memory; inputs and outputs have the names of the torch model's. cache: tokens of a
    causal LM's key-value cache (cached.py)."""
    shapes = shapes or CoreMlShapes()
    _check(model, precision, keep_fp32)
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    training = model.training
    plain = Positional(model, list(example), signature.output_names, signature.call)
    wrapper = (plain if cache is None else CachedDecoder(model, cache)).eval()
    axes = axes_of(signature)
    values = sized_inside(example, shapes, axes)
    # with a cache the example is that of a call: its tokens alone are the model's
    shown = partial(signature.call, model, example) if cache is None else partial(model, example["input_ids"])
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            traceable_masks(MASKED),
            without_cache(model),
            real_arithmetic(model, shown),
            compatible(**({} if cache is None else {"index_copy": index_copy})),
        ):
            warnings.simplefilter("ignore")
            source, shapes = traced(wrapper, values, shapes, axes, route)
            stored, floats = constants(model, source, target, scaled_tables=scaled_tables)
            with storing(stored):
                package = _to_package(source, values, signature, precision, target, shapes, keep_fp32)
            return Converted(package, floats)
    except (ExportError, UserError):
        raise
    except Exception as error:
        raise ExportError(
            f"Core ML could not convert {type(model).__name__} ({route} route): {type(error).__name__}:"
            f" {str(error).strip()[-600:]}. If its forward pass depends on the values of its inputs, rewrite that"
            f" part; try the {'trace' if route == 'export' else 'export'} route; else report it with the config.json."
        ) from error
    finally:
        model.train(training)


def safe_half(
    into: Callable[..., Converted],
    batches: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Mapping[str, Tensor]],
    signature: Signature,
    suspects: Collection[str] = (),
) -> Converted:
    """An fp16 package in which the fewest operations compute in float32, found in the float32 one and checked.

    expected: to each batch what the torch model gives. Raises ExportError where a package does not give it.
    Its facts: kept_fp32 {operation: why}, all_half and kept (differences that the search measured
    without and with them), executed (of the package itself), float_casts in it, and a sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "fp32.mlpackage"
        into(precision="fp32").model.save(str(exact))
        program = MilOps(exact, batches, signature)
        found = overflow.search(program, suspects=suspects, reference=expected)
        kept = {spelling for name in program.with_views(found.keep) for spelling in spellings(name)}
        converted = into(precision="fp16", keep_fp32=kept)
        package = Path(folder) / "fp16.mlpackage"
        converted.model.save(str(package))
        runner = Interpreter(package)
        executed = overflow.worst(
            overflow.compare(wanted, rows(runner(batch), batch, signature))
            for batch, wanted in zip(batches, expected, strict=True)
        )
        described = facts(runner.program)
    if not executed.right():
        raise ExportError(
            f"the fp16 package is wrong on the calibration batches (relative error {executed.error:.2g}), with"
            f" {', '.join(found.keep) or 'nothing'} in float32. Export it as fp32, or name operations in keep_fp32"
        )
    names = f": {', '.join(found.keep)}" if found.keep else ""
    half = {
        **overflow.described(found),
        "executed": overflow.as_json(executed),
        "float_casts": described["float_casts"],
        "said": f"{len(found.keep)} op{'' if len(found.keep) == 1 else 's'} in FP32{names};"
        f" {described['float_casts']} float↔half casts{f' ({found.note})' if found.note else ''}",
    }
    return replace(converted, half=half)


def traced(
    wrapper: nn.Module, values: Mapping[str, Tensor], shapes: CoreMlShapes, axes: Axes, route: Route
) -> tuple[Any, CoreMlShapes]:
    """The graph to convert, and the shapes without those that the model does not take.

    Raises ExportError that lists every operation Core ML has no translation for, and for a model that computes for
    one size alone.
    """
    inputs = tuple(values.values())
    if route == "trace":
        with calls.WrittenOut(calls.COREML):
            graph = torch.jit.trace(wrapper, inputs, check_trace=False, strict=False)
        torch._C._jit_pass_inline(graph.graph)
        kinds = Counter(_kinds(graph.graph))
    else:
        dims = {name: torch.export.Dim(name, min=min(sizes), max=max(sizes)) for name, sizes in flexible(shapes)}
        free = tuple({axis: dims[n] for axis, n in axes[name] if n in dims} for name in values)
        sizes = (free,) if isinstance(wrapper, Positional) else free  # Positional takes *values: one argument
        graph, taken = graphs.export(getattr(wrapper, "model", wrapper), wrapper, inputs, sizes)
        shapes = narrowed(shapes, taken)
        graph = graph.run_decompositions(arguments.table())
        arguments.check(graph)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        kinds = Counter(target.name() for target in targets if hasattr(target, "name"))
    mistaken = {kind for kind in kinds if kind.removeprefix("aten::").partition(".")[0] in arguments.MISTAKEN}
    missing = {kind: count for kind, count in sorted(kinds.items()) if not supported(kind) or kind in mistaken}
    if missing:
        raise ExportError(
            "Core ML has no translation for these operations of the model:"
            f" {', '.join(f'{kind} ({count}×)' for kind, count in missing.items())}."
            " Replace them by others, or register translations with coremltools' register_torch_op."
        )
    return graph, shapes


def _to_package(
    source: Any,
    values: Mapping[str, Tensor],
    signature: Signature,
    precision: str,
    target: str,
    shapes: CoreMlShapes,
    keep_fp32: Collection[str],
) -> ct.models.MLModel:
    half = precision == "fp16" and target != "iOS15"  # inputs and outputs of type float16 came with iOS 16
    selector: Callable[[Any], bool] = lambda operation: operation.name not in keep_fp32  # noqa: E731
    return ct.convert(
        source,
        inputs=tensor_types(values, shapes, axes_of(signature), np.float16 if half else np.float32),
        outputs=[
            ct.TensorType(name=port.name, dtype=np.int32 if "int" in port.dtype else np.float16 if half else np.float32)
            for port in signature.outputs
        ],
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.transform.FP16ComputePrecision(selector) if precision == "fp16" else ct.precision.FLOAT32,
        skip_model_load=True,
    )


def _kinds(graph: Any) -> list[str]:
    """Operations of a TorchScript graph and its blocks, without its own bookkeeping (prim::)."""
    found = []
    for node in graph.nodes():
        if not node.kind().startswith("prim::"):
            found.append(node.kind())
        for block in node.blocks():
            found.extend(_kinds(block))
    return found


def _check(model: nn.Module, precision: str, keep_fp32: Collection[str]) -> None:
    if is_quantized(model):
        raise UserError("a model with fake quantizers is exported to Core ML without them: quantizers.detach(model)")
    if keep_fp32 and precision != "fp16":
        raise UserError(f"keep_fp32 is for precision fp16, this export has precision {precision}")


def save(converted: Converted, folder: Path) -> Exported:
    """Write model.mlpackage into a folder that exists."""
    package = folder / PACKAGE
    converted.model.save(str(package))
    return Exported(folder, package, size(package), converted.floats, converted.half)


def write(
    converted: Converted, folder: Path, *, config: Any = None, processor: Any = None, generation: Any = None
) -> Exported:
    """The same, with config.json and the processor's files in a folder of its own."""
    with whole(folder, config, processor, generation) as scratch:
        done = save(converted, scratch)
    return replace(done, folder=folder, package=folder / PACKAGE)
