"""Torch models to graphs of OpenVINO in memory: traced, with the names that torch has, right at other lengths too."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from mptrain.compress.quantize import quantizers
from mptrain.core import patch
from mptrain.core.errors import ExportError
from mptrain.core.recurrence import Step, replaced
from mptrain.core.signature import BATCH, Signature, without_cache
from mptrain.core.silence import silenced
from mptrain.export.openvino import recurrence
from mptrain.export.openvino.cached import make_stateful
from mptrain.export.torch import calls, graphs, lengths
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.decoding import decoding
from mptrain.export.torch.traceable import Positional, dtype_of, traceable_masks

_GENERATED = re.compile(r"[A-Za-z]+_\d+")
_WRAPPED = "__module.model."  # scope of everything inside Positional


def convert(model: nn.Module, example: Mapping[str, Tensor], signature: Signature, *, cached: bool = False) -> ov.Model:
    """The IR in memory; inputs and outputs carry the names that the torch model has, operations its module names.
    cached: with keys and values as its state, and inputs of its own (cached.py)."""
    model = quantizers.frozen(model)
    model = single(model)  # OpenVINO's frontend reads bf16 constants with the bits of f16
    training = model.training
    shown = partial(signature.call, model, example)
    wrapper: nn.Module = Positional(model.eval(), list(example), signature.output_names, signature.call)
    if cached:
        wrapper, example, signature = decoding(model, signature)
    try:
        with (
            torch.no_grad(),
            silenced(),
            traceable_masks(),
            without_cache(model),
            real_arithmetic(model, shown),
            calls.WrittenOut(calls.OPENVINO),
            replaced(model, recurrence.stand_in) as steps,
            # parity compares with the model; a second and third run after tracing would tell no more
            patch.replaced(torch.jit, trace=partial(torch.jit.trace, check_trace=False)),
        ):
            loops = [recurrence.extension(steps, _cell)] if steps else None
            graph = ov.convert_model(wrapper, example_input=tuple(example.values()), extension=loops)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(_unconverted(model, str(error))) from error
    finally:
        model.train(training)
    _name(graph, example, signature)
    if cached:
        make_stateful(graph)
    else:
        _check_lengths(graph, model.eval(), example, signature)
        model.train(training)
    for inner in recurrence.graphs_of(graph):
        number_names(inner)
    return graph


def check_lengths(model: nn.Module, example: Mapping[str, Tensor], signature: Signature) -> None:
    """What `convert` would say of a model that computes step by step; one that does not is not converted. Raises
    ExportError."""
    if lengths.by_steps(model.eval(), example, signature):
        convert(model, example, signature)


def _cell(step: Step) -> ov.Model:
    return ov.convert_model(step.cell, example_input=step.example())


def _unconverted(model: nn.Module, said: str) -> str:
    """said: by the converter, which lists operations that it lacks among many that fail because of these."""
    lacks = re.search(r"No conversion rule found for operations: (.*)", said)
    if lacks is None:
        return (
            f"OpenVINO could not convert {type(model).__name__}: {said.strip()[-600:]}. If the forward pass"
            " depends on the values of its inputs, rewrite that part; else report it with the model's config.json."
        )
    experts = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    why = (
        f" Its experts ({experts[0]} and others) compute on as many tokens as a router sends each of them, sizes that"
        " a graph does not have: mixtures of experts are not exported to OpenVINO."
        if experts
        else " Rewrite the part of the model that uses it, or report it with the model's config.json."
    )
    return f"OpenVINO has no operation for {lacks[1].strip()}, which {type(model).__name__} needs.{why}"


def single(model: nn.Module) -> nn.Module:
    """The model in float32, a copy if it is not."""
    return model if dtype_of(model) == torch.float32 else copy.deepcopy(model).float()


def _check_lengths(graph: ov.Model, model: nn.Module, example: Mapping[str, Tensor], signature: Signature) -> None:
    """A trace of a loop over the tokens holds as many rounds as the example has. model: in eval mode. Raises
    ExportError."""
    shorter = {}
    for name, value in example.items():
        free = {place: word for place, word in signature.input(name).free.items() if word != BATCH}
        shorter[name] = [max(1, n // 2) if place in free else n for place, n in enumerate(value.shape)]
    if all(list(value.shape) == shorter[name] for name, value in example.items()):
        return
    try:
        graph.clone().reshape({name: ov.PartialShape(shape) for name, shape in shorter.items()})
    except RuntimeError as error:
        said = f"OpenVINO says: {str(error).strip().splitlines()[-1][:200]}"
        raise ExportError(graphs.one_size(model, example.values(), said)) from error
    if not lengths.by_steps(model, example, signature):
        return
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def forward(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return dict(zip(signature.output_names, compiled([batch[name].numpy() for name in example]).values()))

    if (found := lengths.wrong_length(forward, model, example, signature)) is not None:
        said = f"At length {found[0]} the converted graph differs from it by {found[1]:.2g} of its largest value."
        raise ExportError(graphs.one_size(model, example.values(), said))


def _name(graph: ov.Model, example: Mapping[str, Tensor], signature: Signature) -> None:
    outputs = signature.output_names
    if len(graph.inputs) != len(example) or len(graph.outputs) != len(outputs):
        raise ExportError(
            f"the IR has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, the model was called with"
            f" {list(example)} and gave {list(outputs)}: leave out inputs that the model does not use"
        )
    for node in graph.get_ops():  # what the tracer called each value tells nobody anything, and takes 2% of the .xml
        for port in node.outputs():
            port.get_tensor().set_names(set())
    for port, (name, value) in zip(graph.inputs, example.items()):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        free = signature.input(name).free
        shape = [-1 if place in free else size for place, size in enumerate(value.shape)]
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(graph.outputs, outputs):
        port.get_tensor().set_names({name})
    for node in graph.get_ops():
        friendly = node.get_friendly_name()
        if friendly.startswith(_WRAPPED):
            node.set_friendly_name("__module." + friendly.removeprefix(_WRAPPED))
    try:
        graph.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO cannot compute the traced graph at the sizes of the example: {str(error).strip()[-300:]}"
        ) from error


def number_names(graph: ov.Model) -> None:
    """Number generated names anew: they count the operations of the whole process, and the file must not.

    NNCF writes names into the file as well, so this comes before each of its steps.
    """
    graph.set_friendly_name("model")
    for index, node in enumerate(graph.get_ordered_ops()):
        # a constant that was folded has the generated name of what it was folded from
        if _GENERATED.fullmatch(node.get_friendly_name()) and node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
