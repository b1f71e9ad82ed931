"""Low-rank adapters as a method of a stage (LoRA, Hu et al. 2021, arXiv 2106.09685); layers and merging are peft's.

    prepare     a product B·A of rank r beside each chosen weight W, B zero, A drawn; W and all else stand still, but
                for a head (what lies outside the model's base, without an output embedding)
    training    A, B and the head: nothing else has gradients, moments or masters
    finalize    W + (alpha / r)·B·A is the weight, and the model has the layers that it had

In a stage that rounds weights as well (weight_only), as over a base that is rounded already (QLoRA, Dettmers et al.
2023, arXiv 2305.14314), they are rounded again after the merge; `rounded` says how far that moved them, against how far
training did. The adapters are saved in `adapter/` beside the model, for peft and the model that the stage began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mptrain.compress import base
from mptrain.compress.adapters.unmerged import MERGE, unmerged
from mptrain.compress.base import Method, Site, Tools
from mptrain.compress.structure.scopes import resolve
from mptrain.compress.weights import records
from mptrain.compress.weights.layers import LINEAR
from mptrain.core.embeddings import name_in, output_embedding
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.recipe.adapters import Lora

FOLDER = "adapter"


class LowRankAdapters(Method[Lora]):
    order = base.PRUNE

    @classmethod
    def check(cls, config: Lora, skeleton: nn.Module, site: Site) -> None:
        _check_bare(skeleton)
        _adapted(config, skeleton)

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        import peft

        _check_bare(model)
        records.forget(model)  # integers of the weights before, which the merge changes
        names = _adapted(self.config, model)
        self._settings = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # it divides, and needs no integer
            lora_dropout=self.config.dropout,
            target_modules=names,
            modules_to_save=_heads(model) or None,
        )
        self._parameters = sum(p.numel() for p in model.parameters())
        self._before = {name: _weight(model, name).detach().clone() for name in names}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tools.seed)
            self._wrapped = peft.get_peft_model(model, self._settings)
        self._trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return model

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        import peft

        state = peft.get_peft_model_state_dict(self._wrapped)
        self._state = {name: tensor.detach().float().clone() for name, tensor in state.items()}
        self._model: nn.Module = self._wrapped.merge_and_unload().requires_grad_(True)
        self._merged = {name: _weight(self._model, name).detach().clone() for name in self._before}
        return self._model

    def save(self, folder: Path) -> None:
        (folder / FOLDER).mkdir()
        save_file(self._state, folder / FOLDER / "adapter_model.safetensors")
        self._settings.inference_mode = True
        self._settings.save_pretrained(str(folder / FOLDER))

    def facts(self) -> dict[str, Any]:
        """layers: with adapters. trained: parameters, beside `parameters` of the model. rounded: how far the weights
        were moved after the merge, of how far by training; None, not at all."""
        trained = sum(_squared(self._merged[name] - before) for name, before in self._before.items())
        moved = sum(_squared(_weight(self._model, name) - merged) for name, merged in self._merged.items())
        return {
            "layers": len(self._before),
            "trained": self._trained,
            "parameters": self._parameters,
            "rounded": (moved / trained) ** 0.5 if moved and trained else None,
        }


def _check_bare(model: nn.Module) -> None:
    """Raises UserError where something else stands on the layers already."""
    if is_quantized(model):
        raise UserError(
            "adapters: the model carries quantizers of activations on the very layers that adapters are put beside:"
            " train adapters first, and quantize then"
        )
    if layer := unmerged(model):
        raise UserError(f"adapters: {layer} has adapters of peft already: {MERGE}, then give it new ones")


def _adapted(config: Lora, model: nn.Module) -> list[str]:
    """The Linears that get adapters, by their settings. Raises UserError."""
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    if config.targets:
        found = resolve(config.targets, [name for name, _ in model.named_modules()], "adapters.targets")
        names = [name for name in linear if name in found]
    else:
        outside = [*_heads(model), *filter(None, [name_in(model, output_embedding(model))])]
        names = [name for name in linear if not any(name == o or name.startswith(f"{o}.") for o in outside)]
    if not names:
        raise UserError("adapters.targets: no Linear is among them; name some, or train without adapters")
    return names


def _heads(model: nn.Module) -> list[str]:
    """What lies beside the model's base and has parameters of its own, without an output embedding."""
    inner = getattr(model, "base_model_prefix", "")
    if not inner or not hasattr(model, inner):
        return []
    output, kept = output_embedding(model), {id(p) for p in getattr(model, inner).parameters()}
    return [
        name
        for name, child in model.named_children()
        if name != inner and child is not output and any(id(p) not in kept for p in child.parameters())
    ]


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _squared(difference: Tensor) -> float:
    return float(difference.detach().double().square().sum())
