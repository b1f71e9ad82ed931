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

import asyncio
import functools
import io
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from mptrain.compress.weights import records
from mptrain.core.disk import size, whole
from mptrain.core.errors import ExportError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.export.torch.traceable import Positional, traceable_masks, without_cache
from mptrain.verify import overflow
from mptrain.verify.programs import exported
from mptrain.verify.programs.aten import counted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations inside these packages
    from coreai.authoring.asset import AIModelAsset, AIProgram
    from coreai.runtime import NDArray
    from coreai_torch import TorchConverter, get_decomp_table

    from mptrain.export.coreai.weights import packing, stored

ASSET = "model.aimodel"
FUNCTION = "main"
MASKED = -3e4  # added to scores that do not count: finite in fp16 even with a score beside it
_FIXED = {"pixel_values"}  # inputs with only the batch dynamic: images have the size the model was built for


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
    model: PreTrainedModel,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    shapes: Literal["dynamic", "fixed"] = "dynamic",
    calibration: Batches = (),
    few: bool = False,
    keep_fp32: Collection[str] = (),
    processor: Any = None,
) -> Exported:
    """Write folder/ with model.aimodel, config.json and the processor's files.

    model: plain, float32; weights with records (compress.records) are stored as their integers or tables,
    everything else in the precision. It is not changed.
    example: inputs by name; fixes the asset's inputs and, with shapes "fixed", their shapes. "dynamic" needs at
    least 2 examples of at least 2 tokens, and leaves batch and length open (of images the batch). Integers are
    int32 in the asset. A causal LM is exported without a cache.
    calibration: for fp16, batches on which the smallest set of operations to keep in fp32 is found, and on
    which the asset is run against the model before it is moved to `folder`. `few`: it is run on two of their
    examples only, for hosts that compute fp16 in software.
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
    graph, outputs = traced(model, example, shapes=shapes), output_names(model, example)
    half: dict[str, Any] | None = None
    if precision == "fp16":
        half = _to_half(graph, list(example), outputs, calibration, keep_fp32)
    program = converted(graph, model, list(example), outputs)

    def verify(asset: Path) -> None:
        if half is not None:
            half["float_casts"] = float_casts(AIModelAsset.load(asset).program)
        if half is not None and calibration:
            batches = [_smallest(calibration)] if few else calibration
            executed = _executed(model, asset, batches)
            examples = sum(len(next(iter(batch.values()))) for batch in batches)
            half["executed"] = overflow.as_json(executed) | {"examples": examples}
            if not executed.right():
                raise ExportError(
                    f"the fp16 asset of {type(model).__name__} is wrong on the calibration batches: {half}."
                    " Export it as fp32, or name more modules in keep_fp32"
                )

    return write(program, model, folder, processor, half, verify)


def traced(
    model: PreTrainedModel, example: Mapping[str, Tensor], *, shapes: Literal["dynamic", "fixed"] = "dynamic"
) -> ExportedProgram:
    """The graph that is converted: core ATen operations in fp32, inputs in the order of `example`.

    Outputs are the model's tensors in order; `output_names` of a Positional tells their names.
    """
    if model.dtype != torch.float32:
        raise UserError(f"Core AI export: the model is {model.dtype}; give the float32 model (model.float())")
    training, held = model.training, records.of(model)
    wrapper = Positional(model, list(example)).eval()
    axes = _dynamic(example) if shapes == "dynamic" else None
    try:
        with torch.no_grad(), quiet(), traceable_masks(MASKED), without_cache(model), stored(model, held):
            program = torch.export.export(wrapper, tuple(example.values()), dynamic_shapes=axes)
            return program.run_decompositions(get_decomp_table())
    except Exception as error:
        raise ExportError(
            f"torch.export could not trace {type(model).__name__} with {shapes} shapes: {str(error).strip()[-600:]}."
            " If the forward pass depends on the values or the length of its inputs, rewrite that part or use"
            ' shapes "fixed"; else report it with the model\'s config.json.'
        ) from error
    finally:
        model.train(training)


def _dynamic(example: Mapping[str, Tensor]) -> tuple[tuple[dict[int, Any], ...]]:
    """Batch and length of every input; torch.export finds out which of them are equal."""
    found = []
    for name, value in example.items():
        axes = (0,) if name in _FIXED or value.dim() == 1 else (0, 1)
        small = [axis for axis in axes if value.shape[axis] < 2]
        if small:
            raise UserError(
                f"Core AI export with dynamic shapes: input {name} is {tuple(value.shape)}; a size of 1 would stay"
                " fixed, so give an example of at least 2 rows and 2 tokens"
            )
        found.append(dict.fromkeys(axes, torch.export.Dim.DYNAMIC))
    return (tuple(found),)


def output_names(model: nn.Module, example: Mapping[str, Tensor]) -> list[str]:
    """Of the graph that `traced` gives."""
    with torch.no_grad(), quiet(), traceable_masks(MASKED), without_cache(model):
        return Positional(model, list(example)).output_names(*example.values())


def _to_half(
    graph: ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    calibration: Batches,
    keep_fp32: Collection[str],
) -> dict[str, Any]:
    """Cast in place; returns Exported.half."""
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    kept: dict[str, str] = {}
    for wanted in keep_fp32:
        named = [n.name for n in operations if n.name == wanted or _inside(n, wanted)]
        if not named:
            raise UserError(f"Core AI export: keep_fp32 {wanted!r} is no operation and no module of the exported graph")
        kept |= dict.fromkeys(named, "asked for")
    facts: dict[str, Any] = {}
    if calibration:
        ops = exported.GraphOps(graph, inputs, outputs, calibration)
        found = overflow.search(ops, suspects=list(kept))
        kept |= found.reasons
        facts = overflow.described(found) | {"casts": overflow.casts(ops.ops, kept)}
    stays = exported.with_copies(graph, kept)
    with quiet():
        from coreai_opt.casting import cast_fp32_to_fp16  # here, for it imports torchao, which takes seconds

        cast_fp32_to_fp16(graph, ignored_ops=lambda node: node.name in stays)
    more = exported.in_fp32(graph.graph.nodes) - kept.keys()  # coreai-opt's own choice
    return facts | {"kept_fp32": kept | dict.fromkeys(sorted(more), "reads a number that fp16 does not hold")}


def float_casts(program: AIProgram) -> int:
    """Conversions between float and half. Composite operations such as layer_norm have more inside: not counted."""
    graph: Any = program._get_graph(FUNCTION)
    casts = (op for op in graph.bodyRegion.blocks[0].operations if op.name == "coreai.cast")
    ends = ({str(value.type.element_type) for value in (op.operands[0], op.results[0])} for op in casts)
    return sum(pair == {"f16", "f32"} for pair in ends)


def _inside(node: fx.Node, name: str) -> bool:
    found = exported.module(node)
    return found == name or found.startswith(f"{name}.")


def _smallest(batches: Batches) -> Mapping[str, Tensor]:
    """Two examples of the batch with the least values to an example."""
    least = min(batches, key=lambda batch: sum(value[0].numel() for value in batch.values()))
    return {name: value[:2] for name, value in least.items()}


def _executed(model: nn.Module, asset: Path, batches: Batches) -> overflow.Difference:
    """The asset, run, against the fp32 model."""
    runner = Runner(asset)
    try:
        found = []
        for batch in batches:
            with torch.no_grad(), without_cache(model):
                expected = counted(model(**batch), batch)
            got = counted({name: torch.from_numpy(value) for name, value in runner(batch).items()}, batch)
            found.append(overflow.compare({name: expected[name] for name in got}, got))
        return overflow.worst(found)
    finally:
        runner.close()


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


def write(
    program: AIProgram,
    model: PreTrainedModel,
    folder: Path,
    processor: Any,
    half: Mapping[str, Any] | None = None,
    verify: Callable[[Path], None] = lambda _: None,
) -> Exported:
    """Save asset, config and processor in a temporary folder, call `verify` on the asset, and move all to `folder`."""
    with whole(folder, model.config, processor) as scratch:
        program.save_asset(scratch / ASSET)
        verify(scratch / ASSET)
    return Exported(folder, folder / ASSET, size(folder / ASSET), half)


# -- execution


class Runner:
    """An asset as a function of named inputs, computed by Core AI's runtime on this host's CPU.

    The runtime chooses its threads itself. Usable where an event loop is already running (Jupyter):
    the asynchronous calls are made in a thread of their own. States of the asset, such as a key-value
    cache, start as zeros and stay between calls. `close` frees the model; so does the garbage collector.
    """

    execution = "Core AI's runtime on this host's CPU, not an Apple device"

    def __init__(self, asset: Path | str):
        self.asset = Path(asset)
        if not AIModelAsset.is_valid(self.asset):
            raise ExportError(f"{self.asset} is no Core AI asset: give the path of an .aimodel folder")
        stack = AsyncExitStack()
        try:
            loaded = AIModelAsset.load(self.asset)
            model = _wait(stack.enter_async_context(loaded.executable()))
            self._function = model.load_function(FUNCTION)
        except Exception as error:
            _wait(stack.aclose())
            raise ExportError(f"Core AI could not load {self.asset}: {str(error).strip()[-600:]}") from error
        self.close = weakref.finalize(self, lambda: _wait(stack.aclose()))
        described = self._function.desc
        self.inputs = list(described.input_names)
        self.outputs = list(described.output_names)
        self._types = {name: np.dtype(described.input_descriptor(name).dtype) for name in self.inputs}
        self._shapes = {name: described.input_descriptor(name).shape for name in self.inputs}
        self.states = {name: described.state_descriptor(name).shape for name in described.state_names}
        self._state_types = {name: described.state_descriptor(name).dtype for name in described.state_names}
        self.reset()

    def reset(self) -> None:
        """Make the states zeros again."""
        self._state = {name: NDArray(np.zeros(shape, self._state_types[name])) for name, shape in self.states.items()}

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Takes torch tensors or arrays of any width; inputs that the asset lacks are dropped."""
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise ExportError(f"{self.asset} needs the inputs {self.inputs}, the batch lacks {missing}")
        arrays = {name: self._array(name, batch[name]) for name in self.inputs}
        results = _wait(self._function({name: NDArray(array) for name, array in arrays.items()}, self._state))
        return {name: np.array(results[name].numpy()) for name in self.outputs}

    def _array(self, name: str, value: Tensor | np.ndarray) -> np.ndarray:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        expected = self._shapes[name]
        if array.ndim != len(expected) or any(e not in (s, -1, None) for e, s in zip(expected, array.shape)):
            shape = ["any" if size in (-1, None) else size for size in expected]
            raise ExportError(f"{self.asset}: input {name} is {list(array.shape)}, the asset was exported for {shape}")
        return np.ascontiguousarray(array, dtype=self._types[name])


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="coreai", daemon=True).start()
    return loop


def _wait(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(call, _loop()).result()
