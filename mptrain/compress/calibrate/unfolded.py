"""A layer as a product of rows of inputs and its weight, [out, in]: what second moments are of.

    Linear, Conv1D     the last axis of the input is a row
    Conv1d, Conv2d     a row is what a place of the output sees: in channels, then the kernel, as the weight is
                       flattened (im2col); with groups, the outputs of a group see the channels of their group alone

So a rounding method that knows x xᵀ of a Linear rounds a convolution by the same rule, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.compress.weights.layers import CONVOLUTIONS


def geometry(module: nn.Module) -> tuple[Any, ...]:
    """What decides, beside the input, which rows a layer sees: layers that have both in common share their moments."""
    if not isinstance(module, CONVOLUTIONS):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.padding_mode, module.dilation, module.groups)


def products(module: nn.Module, x: Tensor, mask: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Parts of (rows, x xᵀ) of an input, to be added up; x xᵀ is [in, in], or of several groups [groups, in, in].

    mask: of the tokens that count in a Linear; convolutions take padding for inputs. An example at a time: unfolded,
    an input is as many times larger as the kernel has places.
    """
    if isinstance(module, CONVOLUTIONS):
        for example in x.detach() if x.dim() == module.weight.dim() else x.detach()[None]:
            rows = _unfolded(module, example.float())
            product = rows @ rows.transpose(-1, -2)
            yield rows.shape[-1], product[0] if module.groups == 1 else product
        return
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool()]
    x = x.reshape(-1, x.shape[-1]).float()
    yield len(x), x.T @ x


def _unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """[groups, in, places] of one input [channels, …]."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x[None], module._reversed_padding_repeated_twice, mode=mode)
    flat = (1,) * (2 - len(module.kernel_size))  # a sequence is a picture of one line
    padded = padded.unsqueeze(2) if flat else padded
    columns = F.unfold(
        padded,
        (*flat, *module.kernel_size),
        dilation=(*flat, *module.dilation),
        stride=(*flat, *module.stride),
    )
    return columns[0].unflatten(0, (module.groups, -1))
