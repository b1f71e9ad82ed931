"""Quantization-aware training and post-training quantization as methods of a stage."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mptrain.compress import base
from mptrain.compress.base import Method, Site, Sizes, Tools
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.scopes import resolve
from mptrain.core.hooks import HOOKS
from mptrain.recipe.weights import Ptq, Qat


class Quantization(Method[Qat | Ptq]):
    """int8 weights and activations by fake quantizers; those of qat train with the model."""

    order = base.QUANTIZE

    @classmethod
    def check(cls, config: Qat | Ptq, skeleton: nn.Module, site: Site) -> None:
        quantizers.check_installed()
        quantizers.check_attention(skeleton)
        names = [name for name, _ in skeleton.named_modules()]
        resolve(config.ignore, names, "quantize.ignore")
        resolve(list(config.bits), names, "quantize.bits")

    @classmethod
    def outlook(cls, config: Qat | Ptq, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        """Fake quantizers cost about half a training step."""
        embeddings = 1.0 if config.embeddings == "int8" else None
        return replace(sizes, layer_bytes=1.0, embedding_bytes=embeddings, step=1.5 * sizes.step)

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        quantized = quantizers.quantize(model, self.config, tools.inputs())
        self._shapes = _shapes(quantized)
        return quantized

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        """After a cut the ranges are sliced; `carry: recalibrate` has them anew."""
        if isinstance(self.config, Ptq) or self.config.carry == "slice" or _shapes(model) == self._shapes:
            return model
        plain, _, _ = quantizers.detach(model)
        return quantizers.quantize(plain, self.config, tools.inputs())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if HOOKS not in name}
