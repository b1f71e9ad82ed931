"""Causal language models as IR that keep their keys and values between calls, as OVModelForCausalLM wants them.

    call   input_ids [b, n], attention_mask [b, past + n], beam_idx [b], where the model takes them position_ids [b, n]
    state  past_key_values.<layer>.key and .value, [b, key-value heads, past, head size]; after a reset past is 0
    gives  logits [b, n, vocabulary]; the state has past + n places then

Row i of a call goes on with row beam_idx[i] of the state. The trace has keys and values as inputs and outputs; a pair
of them is made a variable, which starts empty with the rows of input_ids. All layers keep all places, also those that
attend to a window: their mask leaves the others out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mptrain.core.errors import ExportError
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.openvino.runner import CachedIr
from mptrain.export.torch.cached_decoder import CHECKED, check_decoder
from mptrain.verify import parity

BEAM = "beam_idx"
CALL = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("attention_mask", (BATCH, "tokens"), "int64")),
    (Port("logits", (BATCH, "tokens", "vocabulary")),),
)
"""of whole texts"""
EXACT, ROUGH = 1e-4, 0.5
"""relative differences that are let pass: in float32, and where activations are rounded to 8 bits, which the last digit
of a float decides (0.07 to 0.12 in SmolLM2-135M); a cache that is not read or reordered makes them about 1"""
_PAST, _PRESENT = "past_key_values", "present"
_KINDS = ("key", "value")


class WithPast(nn.Module):
    """model: a causal LM. By position: the tensors that `inputs` names, then key and value of each layer. Gives the
    logits, then key and value of each layer with the new places."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, list(inputs)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        past = values[len(self.inputs) :]
        cache = DynamicCache()
        for keys, held in zip(past[::2], past[1::2]):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, held)
            layer.keys, layer.values = keys, held
            cache.layers.append(layer)
        named: dict[str, Any] = dict(zip(self.inputs, values))
        outputs = self.model(**named, past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        return (outputs.logits, *(value for layer in layers for value in (layer.keys, layer.values)))


def decoding(model: nn.Module) -> tuple[WithPast, dict[str, Tensor], Signature]:
    """What is traced, its inputs of two rows, two tokens and three places, and its signature.

    Raises UserError for a model that keeps other things than keys and values, or is no causal LM.
    """
    decoder, held = check_decoder(model)
    tokens, past, everything = "tokens", "past", "places"
    ports = [Port("input_ids", (BATCH, tokens), "int64"), Port("attention_mask", (BATCH, everything), "int64")]
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        ports.append(Port("position_ids", (BATCH, tokens), "int64"))
    inputs = [port.name for port in ports]
    outputs = [Port("logits", (BATCH, tokens, "vocabulary"))]
    example = {
        "input_ids": torch.arange(4).reshape(2, 2) % decoder.config.get_text_config().vocab_size,
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(3, 5).repeat(2, 1),
    }
    example = {name: example[name] for name in inputs}
    for index, layer in enumerate(held):
        for kind, value in zip(_KINDS, layer):
            _, heads, _, size = value.shape
            example[f"{_PAST}.{index}.{kind}"] = torch.zeros(2, heads, 3, size)
            ports.append(Port(f"{_PAST}.{index}.{kind}", (BATCH, heads, past, size)))
            outputs.append(Port(f"{_PRESENT}.{index}.{kind}", (BATCH, heads, everything, size)))
    return WithPast(decoder, inputs), example, Signature(tuple(ports), tuple(outputs))


def make_stateful(graph: ov.Model) -> None:
    """Make variables of the keys and values of a converted decoder, and add beam_idx, int32."""
    names = [port.any_name for port in graph.inputs if port.any_name.startswith(_PAST)]
    beam = opset.parameter(ov.PartialShape([-1]), ov.Type.i32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    graph.add_parameters([beam])
    for name in names:
        held = graph.input(name)
        readers = held.get_target_inputs()
        chosen = opset.gather(held, beam, opset.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {name: name.replace(_PAST, _PRESENT, 1) for name in names})
    rows = opset.gather(
        opset.shape_of(graph.input("input_ids"), output_type="i64"), opset.constant([0]), opset.constant(0)
    )
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = opset.constant(np.array([heads.get_length(), 0, size.get_length()], dtype=np.int64))
            node.set_arguments([opset.broadcast(opset.constant(np.float32(0)), opset.concat([rows, rest], 0))])
    graph.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])  # the CPU plugin's own choice is 8 bits
    graph.validate_nodes_and_infer_types()


def check(runner: CachedIr, model: nn.Module, *, exact: bool) -> None:
    """Feed made-up texts token by token. One row is padded on the left, one on the right; halfway rows change places.

    exact: the logits of both, whole texts and token by token, must be the model's; else, the one those of the other.
    Raises ExportError.
    """
    tokens, config = min(runner.max_length or CHECKED, CHECKED), cast(PreTrainedModel, model).config.get_text_config()
    ids = (7 * torch.arange(3 * tokens) + 1).reshape(3, tokens) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, : tokens // 3], mask[2, tokens - tokens // 3 :] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in runner.inputs:
        batch["position_ids"] = torch.where(mask == 0, 1, mask.cumsum(1) - 1)
    try:
        whole, steps = runner(batch), {"logits": _token_by_token(runner, ids, mask)}
    except RuntimeError as error:
        said = " ".join(str(error).split())[-300:]
        raise ExportError(
            f"an export with a cache: OpenVINO cannot run {type(model).__name__} token by token ({said}); export it"
            " without a cache"
        ) from error
    kept = mask.bool().numpy()
    logits, apart = whole["logits"][kept], (whole["logits"] - steps["logits"])[kept]
    found = {"as a whole": float(np.sqrt(np.square(apart).mean()) / logits.std())}
    if exact:
        # with the noise of float32 left out, as of any export
        found["in torch"] = parity.compare(model, lambda _: steps, [batch], signature=CALL)["relative"]
    for how, difference in found.items():
        if not difference <= (EXACT if exact else ROUGH):
            raise ExportError(
                f"an export with a cache: {type(model).__name__} gives other logits token by token than {how}, by"
                f" {difference:.2g} of their size; export it without a cache"
            )


def _token_by_token(runner: CachedIr, ids: Tensor, mask: Tensor) -> np.ndarray:
    """Logits [rows, tokens, vocabulary], each row where it stands in ids."""
    runner.reset()
    order, found = np.arange(len(ids)), []
    for place in range(ids.shape[1]):
        beams = np.roll(np.arange(len(ids)), 1) if place == ids.shape[1] // 2 else np.arange(len(ids))
        order = order[beams]
        part = {"input_ids": ids[order, place : place + 1], "attention_mask": mask[order, : place + 1]}
        logits = runner.step({**part, BEAM: beams.astype(np.int32)})["logits"]
        found.append(logits[np.argsort(order)])
    return np.concatenate(found, 1)
