"""One call of a causal language model with its keys and values as inputs and outputs, as converters trace it.

    call   input_ids [b, n], attention_mask [b, past + n], where the model takes them position_ids [b, n], and
           past_key_values.<layer>.key and .value, [b, key-value heads, past, head size]
    gives  logits [b, n, vocabulary], or what heads make of the last, and present.<layer>.key and .value with past + n
           places

The names are optimum's. All layers keep all places, also those that attend to a window: their mask leaves the others
out. past is 0 at the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mptrain.core.errors import UserError
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.torch.cached_decoder import check_decoder

PAST, PRESENT = "past_key_values", "present"
BEAM = "beam_idx"
_KINDS = ("key", "value")


class WithPast(nn.Module):
    """model: a causal LM. By position: the tensors that `inputs` names, then key and value of each layer. Gives the
    outputs of the signature, then key and value of each layer with the new places."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], signature: Signature) -> None:
        super().__init__()
        self.model, self.inputs, self.signature = model, list(inputs), signature

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        past = values[len(self.inputs) :]
        cache = DynamicCache()
        for keys, held in zip(past[::2], past[1::2]):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, held)
            layer.keys, layer.values = keys, held
            cache.layers.append(layer)
        named: dict[str, Any] = dict(zip(self.inputs, values))
        outputs = self.signature.run(self.model, {**named, "past_key_values": cache, "use_cache": True})
        layers: list[Any] = list(cache.layers)
        return (*outputs.values(), *(value for layer in layers for value in (layer.keys, layer.values)))


def decoding(model: nn.Module, signature: Signature) -> tuple[WithPast, dict[str, Tensor], Signature]:
    """What is traced, its inputs of two rows, two tokens and three places, and its signature.

    signature: of whole texts, whose outputs it has.
    Raises UserError for a model that keeps other things than keys and values, or is no causal LM.
    """
    decoder, held = check_decoder(model)
    tokens, past, everything = "tokens", "past", "places"
    ports = [Port("input_ids", (BATCH, tokens), "int64"), Port("attention_mask", (BATCH, everything), "int64")]
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        ports.append(Port("position_ids", (BATCH, tokens), "int64"))
    inputs = [port.name for port in ports]
    outputs = list(signature.outputs)
    example = {
        "input_ids": torch.arange(4).reshape(2, 2) % decoder.config.get_text_config().vocab_size,
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(3, 5).repeat(2, 1),
    }
    example = {name: example[name] for name in inputs}
    for index, layer in enumerate(held):
        for kind, value in zip(_KINDS, layer):
            _, heads, _, size = value.shape
            example[f"{PAST}.{index}.{kind}"] = torch.zeros(2, heads, 3, size)
            ports.append(Port(f"{PAST}.{index}.{kind}", (BATCH, heads, past, size)))
            outputs.append(Port(f"{PRESENT}.{index}.{kind}", (BATCH, heads, everything, size)))
    return WithPast(decoder, inputs, signature), example, Signature(tuple(ports), tuple(outputs))


def present(past: str) -> str:
    """The output with the new places of an input that holds those so far."""
    return past.replace(PAST, PRESENT, 1)


def whole_texts(batch: Mapping[str, Tensor], ports: Signature) -> dict[str, Tensor]:
    """A call of whole texts, from an empty cache on, with all inputs of a decoder."""
    call = {name: torch.as_tensor(value) for name, value in completed(batch, None).items()}
    for port in ports.inputs:
        if port.name.startswith(PAST):
            _, heads, _, size = port.axes
            call[port.name] = torch.zeros(len(call["input_ids"]), int(heads), 0, int(size))
    return call


def completed(batch: Mapping[str, Tensor | np.ndarray], max_length: int | None) -> dict[str, Any]:
    """A call with all that a decoder may ask for, but for the past.

    batch: input_ids [rows, n], the new tokens, and attention_mask [rows, places so far + n], default all ones. Where
    these are missing, position_ids are counted from each text's first token, and beam_idx says that each row goes on
    with its own past. max_length: tokens of the longest text. Raises UserError for one that is longer.
    """
    ids = np.asarray(batch["input_ids"])
    mask = np.asarray(batch.get("attention_mask", np.ones_like(ids)))
    counted = mask.cumsum(1)
    if max_length is not None and counted.max(initial=0) > max_length:
        raise UserError(
            f"a text of {counted.max()} tokens does not fit the export's cache of {max_length}: raise `cache`,"
            " or make the texts shorter"
        )
    positions = np.where(mask == 0, 1, counted - 1)[:, -ids.shape[1] :]
    made = {"attention_mask": mask, "position_ids": positions, BEAM: np.arange(len(ids), dtype=np.int32)}
    return {**made, **batch}
