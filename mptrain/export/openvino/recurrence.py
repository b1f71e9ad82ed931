"""Recurrences of a model (`core.recurrence`) as TensorIterators.

trace     mptrain::recurrence(x, state, number) in place of the steps
convert   TensorIterator: x in slices of one step along axis 1, the state handed on, all states put together again
body      the cell, converted by itself; its operations and weights have the names that they have in the model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openvino as ov
import torch
from openvino import opset13 as opset
from openvino.frontend.pytorch import ConversionExtension
from torch import Tensor

from mptrain.core.recurrence import Step

_OPERATION = "mptrain::recurrence"
_LOOPS = {"TensorIterator", "Loop"}


@torch.library.custom_op(_OPERATION, mutates_args=())
def stand_in(x: Tensor, state: Tensor, number: int) -> Tensor:
    """Zeros in the shape of the states, for a trace needs no values."""
    return x.new_zeros(x.shape[0], x.shape[1], state.shape[1])


def extension(steps: list[Step], convert: Callable[[Step], ov.Model]) -> ConversionExtension:
    """For `convert_model`. steps: as `replaced` gives them. convert: a cell by itself, (x_t, state) to the state."""

    def lowered(context: Any) -> list[ov.Output]:
        x, state = context.get_input(0), context.get_input(1)
        step = steps[context.get_values_from_const_input(2)]
        return [_iterated(x, state, _named(convert(step), step.name))]

    return ConversionExtension(_OPERATION, lowered)


def _iterated(x: ov.Output, state: ov.Output, body: ov.Model) -> ov.Output:
    """Of x [batch, steps, features] and the first state [batch, size]: the states [batch, steps, size]."""
    slice_, before = body.get_parameters()
    taken = opset.parameter(ov.PartialShape([-1, 1, -1]), ov.Type.f32)
    row = opset.squeeze(taken, opset.constant(1))
    for reader in slice_.output(0).get_target_inputs():
        reader.replace_source_output(row.output(0))
    after = body.get_results()[0].input_value(0)
    kept = opset.unsqueeze(after, opset.constant(1))
    handed_on, written = opset.result(after), opset.result(kept)
    for node, name in ((taken, "x"), (before, "state"), (handed_on, "next_state"), (written, "states")):
        node.set_friendly_name(name)  # in place of generated ones, which count what a process has made
        node.output(0).get_tensor().set_names({name})
    loop = opset.tensor_iterator()
    loop.set_body(ov.Model([handed_on, written], [taken, before], "step"))
    loop.set_sliced_input(taken, x, 0, 1, 1, -1, 1)
    loop.set_merged_input(before, state, handed_on.output(0))
    return loop.get_concatenated_slices(written.output(0), 0, 1, 1, -1, 1)


def _named(body: ov.Model, name: str) -> ov.Model:
    for node in body.get_ops():
        friendly = node.get_friendly_name()
        if friendly.startswith("__module."):
            node.set_friendly_name(f"__module.{name}.cell.{friendly.removeprefix('__module.')}")
        elif friendly.startswith("aten::"):
            node.set_friendly_name(f"__module.{name}.cell/{friendly}")
        elif friendly.startswith("self."):
            node.set_friendly_name(f"self.model.{name}.cell.{friendly.removeprefix('self.')}")
    return body


def graphs_of(graph: ov.Model) -> Iterator[ov.Model]:
    """The bodies of its loops, then the graph itself."""
    for node in graph.get_ops():
        if node.get_type_name() in _LOOPS:
            yield from graphs_of(node.get_function())
    yield graph
