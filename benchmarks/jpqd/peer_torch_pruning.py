"""torch-pruning on a BERT: global first-order Taylor importance, whole heads and FFN channels."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn

from mptrain.models import artifact


def prune_with_torch_pruning(dense: Path, batches: list[dict[str, Tensor]], params: int) -> dict[str, Tensor]:
    """The weights left of the model in `dense`, with at most `params` parameters: bisection on the pruning ratio."""
    model = artifact.load(dense).eval()
    for parameter in model.parameters():
        parameter.requires_grad_()
    for batch in batches:
        model(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    low, high, best = 0.0, 0.99, None
    for _ in range(9):
        ratio = (low + high) / 2
        pruned = _pruned(model, gradients, batches[0], ratio)
        if sum(p.numel() for p in pruned.parameters()) <= params:
            best, high = pruned, ratio
        else:
            low = ratio
    assert best is not None
    return {name: p.detach().contiguous() for name, p in best.named_parameters()}


def _pruned(model: nn.Module, gradients: dict[str, Tensor], batch: dict[str, Tensor], ratio: float) -> nn.Module:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    heads, prunable = {}, set()
    for name, module in model.named_modules():
        if name.endswith(".attention.self"):
            heads |= dict.fromkeys((module.query, module.key, module.value), module.num_attention_heads)
            prunable |= {module.query, module.key, module.value}
        elif name.endswith(".intermediate.dense"):
            prunable.add(module)
    fixed = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm)) and m not in prunable]
    pruner = tp.pruner.BasePruner(
        model,
        {name: value[:2] for name, value in batch.items() if name != "labels"},
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        round_to=None,
        ignored_layers=fixed,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda out: out.logits.sum(),
    )
    with torch.enable_grad():
        pruner.step()
    return model
