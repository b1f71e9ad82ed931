"""Quantization-aware training and post-training quantization as methods of a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mptrain.compress import base
from mptrain.compress.base import Method, Site, Sizes, Tools
from mptrain.compress.quantize import embedding, quantizers
from mptrain.compress.structure.scopes import resolve
from mptrain.core.hooks import HOOKS
from mptrain.core.signature import Batch
from mptrain.recipe.weights import Ptq, Qat


class Quantization(Method[Qat | Ptq]):
    """int8 weights and activations by fake quantizers; those of qat train with the model."""

    order = base.QUANTIZE
    _restored: dict[str, Any] | None = None

    @classmethod
    def check(cls, config: Qat | Ptq, skeleton: nn.Module, site: Site) -> None:
        quantizers.check_installed()
        quantizers.check_attention(skeleton)
        quantizers.check_ignored(config, skeleton)
        resolve(list(config.bits), [name for name, _ in skeleton.named_modules()], "quantize.bits")
        if config.embeddings == "int4":
            embedding.table_of(skeleton)

    @classmethod
    def outlook(cls, config: Qat | Ptq, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        """Fake quantizers cost about half a training step."""
        embeddings = None if config.embeddings == "fp32" else 1.0  # int4 where the export asks for it
        return replace(sizes, layer_bytes=1.0, embedding_bytes=embeddings, step=1.5 * sizes.step)

    def still(self, model: nn.Module) -> list[nn.Parameter]:
        if self.config.embeddings != "int4":
            return []
        return list(embedding.table_of(model).parameters())

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        for table in self.still(model):
            table.data.copy_(embedding.rounded(table))
        batches = tools.inputs()
        if self.config.limit is not None:
            self._restored = self._search(self.config.limit, model, batches, tools)
            self.config = self.config.model_copy(update={"ignore": self._restored["ignore"]})
        quantized = quantizers.quantize(model, self.config, batches)
        self._shapes = _shapes(quantized)
        return quantized

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        """After a cut the ranges are sliced; `carry: recalibrate` has them anew."""
        if isinstance(self.config, Ptq) or self.config.carry == "slice" or _shapes(model) == self._shapes:
            return model
        plain, _, _ = quantizers.detach(model)
        return quantizers.quantize(plain, self.config, tools.inputs())

    def facts(self) -> dict[str, Any]:
        return {} if self._restored is None else {"restored": self._restored}

    def _search(self, limit: float, model: nn.Module, batches: list[Batch], tools: Tools) -> dict[str, Any]:
        from mptrain.compress.quantize import restore

        def quantized(ignore: list[str]) -> nn.Module:
            return quantizers.quantize(model, self.config.model_copy(update={"ignore": ignore}), batches)

        return tools.once("restored", lambda: restore.search(model, quantized, batches, tools.score, limit))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if HOOKS not in name}
