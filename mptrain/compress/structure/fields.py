"""Which dimension of a layer's weight is its outputs and which its inputs, and the attributes that repeat its sizes.

Layers of torch compute from the shapes of their weights; `out_features` and its like are for tools and repr, but some
are read (`groups` of a convolution, `normalized_shape`), so a cut puts all of them right.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from mptrain.compress.structure.blocks import Axis, Edit

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def output_dim(module: nn.Module) -> int | None:
    """The dimension of `weight` that is the layer's outputs; None for a module that is no such layer."""
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return 0
    return 1 if isinstance(module, Conv1D) else None


def input_dim(module: nn.Module) -> int | None:
    found = output_dim(module)
    return None if found is None else 1 - found


def edits_of(model: nn.Module, axes: Iterable[Axis]) -> list[Edit]:
    """The edits that layers of torch and transformers' Conv1D need when these axes are cut."""
    found: dict[Edit, None] = {}
    for axis in axes:
        owner, _, name = axis.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if name == "weight":
            for attribute, item in _fields(module, axis.dim):
                found[Edit(owner, attribute, axis.per_unit, item)] = None
    return list(found)


def _fields(module: nn.Module, dim: int) -> list[tuple[str, int | None]]:
    """(attribute, item) of the sizes that are this dimension of `weight`."""
    if isinstance(module, nn.Linear):
        return [("out_features" if dim == 0 else "in_features", None)]
    if isinstance(module, Conv1D):
        return [("nf" if dim == 1 else "nx", None)]
    if isinstance(module, _CONVOLUTIONS):
        if module.groups > 1 and dim == 0:  # depthwise: a channel is a group
            return [("out_channels", None), ("in_channels", None), ("groups", None)]
        return [("out_channels" if dim == 0 else "in_channels", None)] if dim < 2 else []
    if isinstance(module, nn.Embedding):
        return [("num_embeddings" if dim == 0 else "embedding_dim", None)]
    if isinstance(module, _NORMS):
        return [("num_features", None)]
    if isinstance(module, nn.GroupNorm):
        return [("num_channels", None)]
    if isinstance(module, nn.LayerNorm) and dim < len(module.normalized_shape):
        return [("normalized_shape", dim)]
    return []
