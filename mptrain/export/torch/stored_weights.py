"""A quantized model as targets take it that store weights alone."""

from __future__ import annotations

from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.export.base import Embeddings

DROPPED = (
    "the fake quantizers of activations: the package computes in floating point with the integers of the weights;"
    " its operations on 8-bit activations exist on few devices and have not been run"
)
"""`Facts.dropped` of such a target"""


def stored_weights(model: nn.Module, embeddings: Embeddings) -> nn.Module:
    """With the integers that its fake quantizers learned as records, and without the quantizers.

    Embeddings, which have no fake quantizers, get int8 and one scale to a row where that is asked for. A model
    without quantizers is returned as it is.
    """
    if not quantizers.is_quantized(model):
        return model
    from mptrain.compress.quantize.integers import weight_only

    return weight_only(model, embeddings=embeddings)
