"""The files that a model becomes, each a function with inputs by position; the names are those that optimum looks for.

whole             model.onnx
with a cache      model.onnx, one call of a decoder with keys and values as inputs and outputs
encoder, decoder  encoder_model.onnx: the text to encoder_hidden_states; decoder_model.onnx: these and the tokens
                  so far to logits. A text is encoded once, however many tokens are written
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mptrain.core.signature import MASK, Batch, Port, Signature, without_cache
from mptrain.export.torch.decoding import decoding, whole_texts
from mptrain.export.torch.traceable import Positional
from mptrain.verify.outputs import rows

FILE = "model.onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
TOKENS, OF_DECODER = "decoder_input_ids", "decoder_"
ENCODED, SEEN = "encoder_hidden_states", "encoder_attention_mask"
PASSED_ON = "encoder_last_hidden_state"
"""an output of models that is their encoder's"""


@dataclass(frozen=True)
class Part:
    """file: its name. module: what it computes. example, ports: of it. call: (inputs of the model) to its own.
    counts: the outputs that a search compares, and what of them is padding."""

    file: str
    module: nn.Module
    example: Mapping[str, Tensor]
    ports: Signature
    counts: Signature
    call: Callable[[Mapping[str, Tensor]], Batch]

    @torch.no_grad()
    def expected(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs that count, in torch, without their padding."""
        call = self.call(batch)
        found = dict(zip(self.ports.output_names, self.module(*(call[name] for name in self.ports.input_names))))
        return rows(found, batch, self.counts)


def parts_of(model: nn.Module, example: Mapping[str, Tensor], signature: Signature, *, cached: bool) -> list[Part]:
    """In the order in which they run. model: in eval mode. Raises UserError for a model that cannot have a cache."""
    if cached:
        decoder, given, ports = decoding(model, signature)
        return [Part(FILE, decoder, given, ports, signature, partial(whole_texts, ports=ports))]
    if TOKENS in signature.input_names and callable(getattr(model, "get_encoder", None)):
        return _encoder_and_decoder(model, example, signature)
    module = Positional(model, signature.input_names, signature.output_names, signature.call)
    return [Part(FILE, module, example, signature, signature, dict)]


def _encoder_and_decoder(model: Any, example: Mapping[str, Tensor], signature: Signature) -> list[Part]:
    read = tuple(port for port in signature.inputs if not port.name.startswith(OF_DECODER))
    names = [port.name for port in read]
    encoder = _Encoder(model, names)
    with torch.no_grad(), without_cache(model):
        (encoded,) = encoder(*(example[name] for name in names))
    axes = (*read[0].axes[:2], encoded.shape[2])
    first = Signature(read, (Port("last_hidden_state", axes),))

    def encoder_call(batch: Mapping[str, Tensor]) -> Batch:
        return {name: batch[name] for name in names}

    masked = [
        replace(port, name=SEEN) for port in read if port.name == MASK and encoded.shape[1] == example[MASK].shape[1]
    ]
    tokens = replace(signature.input(TOKENS), name="input_ids")
    written = tuple(port for port in signature.outputs if port.name != PASSED_ON)
    second = Signature((tokens, *masked, Port(ENCODED, axes)), written)

    @torch.no_grad()
    def decoder_call(batch: Mapping[str, Tensor]) -> Batch:
        with without_cache(model):
            (hidden,) = encoder(*(batch[name] for name in names))
        own = {"input_ids": batch[TOKENS], **{port.name: batch[MASK] for port in masked}, ENCODED: hidden}
        return {**batch, **own}  # masks of the model say what of the outputs is padding

    decoder = _Decoder(model, second.input_names, second.output_names)
    return [
        Part(ENCODER, encoder, encoder_call(example), first, first, encoder_call),
        Part(DECODER, decoder, decoder_call(example), second, replace(signature, outputs=written), decoder_call),
    ]


class _Encoder(nn.Module):
    """Through the whole model, whose quantizers act in its own forward; what its decoder makes is dropped."""

    def __init__(self, model: Any, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        token = torch.zeros((values[0].shape[0], 1), dtype=torch.long, device=values[0].device)
        return (self.model(**dict(zip(self.inputs, values)), decoder_input_ids=token)[PASSED_ON],)


class _Decoder(nn.Module):
    def __init__(self, model: Any, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.inputs, values))
        found = self.model(
            decoder_input_ids=given["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=given[ENCODED]),
            attention_mask=given.get(SEEN),
        )
        return tuple(found[name] for name in self.outputs)
