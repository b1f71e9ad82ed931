"""Labels through products: of numbers with a parameter, of numbers with numbers, convolutions, attention.

    x @ W        x[.., k] meets the node (W, in, k), a *sink*; channel n of the result is (W, out, n), a *source*
    x @ y        everything of one slice of the batch meets: a head's queries, keys and values become one class
    attention    the same, for the kernels that do it at once
    convolution  like a Linear over channels; with groups, what is within a group meets

Two things do not join what they read:

    one matrix for each head alike   W of shape [head size, …] is applied to every head: rows of x belong to different
                                     classes. The result's rows stay in their class and W belongs to none.
    a key that all heads read        multi-query attention: one vector is read alike by every slice. It belongs to no
                                     head; it is frozen and stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mptrain.compress.structure.dataflow.labels import CODES, Labels, is_node, nodes_in
from mptrain.compress.structure.dataflow.marks import KEY, OTHER, QUERY, VALUE, Marks
from mptrain.compress.structure.dataflow.record import Operation


class Products:
    def __init__(self, labels: Labels, marks: Marks) -> None:
        self.labels = labels
        self.marks = marks

    # -- matrices

    def matmul(self, a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
        """Labels of a [.., m, k] @ b [.., k, n], shape: of the result."""
        is_weight = [self._is_matrix(t) for t in (a, b)]
        if all(is_weight):  # a looked-up embedding times a weight: the weight is the one that is the parameter itself
            own = [self.labels.is_parameter(t) for t in (a, b)]
            is_weight = [False, True] if own[1] or not own[0] else [True, False]
        if is_weight[1]:
            return self._linear(self.labels.full(a), b[(0,) * (b.dim() - 2)], shape)
        if is_weight[0]:
            x, w = self.labels.full(b).transpose(-1, -2), a[(0,) * (a.dim() - 2)].transpose(-1, -2)
            swapped = (*shape[:-2], shape[-1], shape[-2])
            return self._linear(x, w, swapped).transpose(-1, -2)
        x, y = self.labels.full(a), self.labels.full(b)
        has_x, has_y = bool(is_node(x).any()), bool(is_node(y).any())
        if not (has_x and has_y):
            one = self.labels.along(x, [-1]) if has_x else self.labels.along(y, [-2])
            return (
                one.expand(tuple(shape)) if has_x or has_y else torch.full((1,) * len(shape), -1).expand(tuple(shape))
            )
        self._roles(x, y)
        batch = tuple(shape[:-2])
        sides = [x.expand(*batch, *x.shape[-2:]), y.transpose(-1, -2).expand(*batch, *y.shape[:-3:-1])]
        return (
            self._slices([side.reshape(-1, *side.shape[-2:]) for side in sides]).view(*batch, 1, 1).expand(tuple(shape))
        )

    def _is_matrix(self, tensor: Tensor) -> bool:
        row, column = (self.labels.full(t).reshape(-1) for t in (tensor[..., :1, :], tensor[..., :, :1]))
        return self.labels.place(torch.cat([row, column])) is not None

    def _linear(self, x: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """weight: [k, n]. shape: of the result."""
        outputs = self.labels.nodes_along(self.labels.full(weight[:1])[0])
        assert outputs is not None
        inputs = self.labels.nodes_along(self.labels.full(weight[:, :1])[:, 0], taken=outputs[1])
        assert inputs is not None
        rows = x.reshape(-1, x.shape[-1])
        (rows,) = thin_rows(rows)
        if len(rows) > 1 and is_node(rows).all():
            classes = self.labels.along(x, [-1])
            if len(classes.unique()) > 1:  # heads: each keeps to itself
                return classes.expand(tuple(shape))
        self.marks.sink(inputs[0])
        self.marks.source(outputs[0])
        self.labels.meet(inputs[0], rows)
        return outputs[0].expand(tuple(shape))

    # -- numbers with numbers

    def _roles(self, x: Tensor, y: Tensor) -> None:
        """Queries times keys; then what came of it, times values."""
        nodes = nodes_in(x).numpy()
        first = bool((self.marks.roles[nodes] == OTHER).any())
        self.marks.role(x, QUERY)
        self.marks.role(y, KEY if first else VALUE)

    def _slices(self, parts: Sequence[Tensor]) -> Tensor:
        """The class of every slice: parts are [slices, rows, channels]."""
        flat = [part.flatten(1) for part in self._without_common(parts)]
        return self.labels.along(torch.cat(flat, 1), [1])[:, 0]

    def _without_common(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Without the channels that every slice reads alike, while it has others of its own."""
        rows = torch.cat([part.flatten(1) for part in parts], 1).unique(dim=0)
        if len(rows) < 2 or not is_node(rows).any():
            return list(parts)
        held = [set(row[is_node(row)].tolist()) for row in rows]
        common = set.intersection(*held)
        if not common or not all(own - common for own in held):
            return list(parts)
        sizes = np.bincount(self.labels.roots()[self.marks.sources], minlength=len(self.labels.parent))
        sinks = set(self.labels.roots()[self.marks.sinks].tolist())
        whole = [c for c in common if c not in sinks and any(_lines(part, c) == sizes[c] for part in parts)]
        if not whole:
            return list(parts)
        self.marks.freeze(torch.tensor(whole), "every head reads it")
        gone = torch.tensor(whole)
        return [torch.where(torch.isin(part, gone), -1, part) for part in parts]

    def attention(self, operation: Operation) -> Tensor:
        """scaled_dot_product_*: query [.., heads, m, e], key and value with as many heads or a divisor of it."""
        query, key, value = operation.args[:3]
        mask = operation.argument(3, "attn_mask", operation.kwargs.get("attn_bias"))
        mask = mask if isinstance(mask, Tensor) else None
        heads, slices = query.shape[1], query.shape[:2]
        parts = []
        for role, tensor in ((QUERY, query), (KEY, key), (VALUE, value)):
            labels = self.labels.full(tensor)
            self.marks.role(labels, role)
            parts.append(labels.repeat_interleave(heads // labels.shape[1], 1).flatten(0, 1))
        flat = [part.flatten(1) for part in self._without_common(parts)]
        if mask is not None:
            flat.append(self.labels.full(mask).expand(*slices, *mask.shape[-2:]).flatten(0, 1).flatten(1))
        joined = self.labels.along(torch.cat(flat, 1), [1])[:, 0].view(*slices, 1, 1)
        self.marks.attended(joined[..., 0, 0], operation.module)
        if mask is not None and self.labels.of(mask) is None:
            self.marks.constant(mask, joined.expand(*slices, *mask.shape[-2:]))
        return joined.expand(operation.outputs[0].shape)

    # -- convolutions

    def convolution(self, operation: Operation) -> Tensor:
        """x [batch, in, *extent], weight [out, in / groups, *kernel]."""
        x, weight, bias, *_ = operation.args
        out = operation.outputs[0]
        transposed, groups = operation.args[6], operation.args[8]
        inputs, kernel = self.labels.full(x), self.labels.full(weight)
        corner = kernel.flatten(2)[..., 0]
        place = self.labels.place(torch.cat([corner[:, 0], corner[0]]))
        if place is None or transposed:
            whole = torch.cat([inputs.reshape(-1).unique(), corner.reshape(-1).unique()])
            self.marks.freeze(self.labels.along(whole, [0]), "a transposed or computed convolution")
            return self.labels.along(whole, [0]).view((1,) * out.dim()).expand(out.shape)
        first = self.labels.first_node[place[0]]
        outputs = first[0] + torch.arange(weight.shape[0])
        self.marks.source(outputs, convolution=groups == 1)
        channels = inputs.transpose(0, 1).flatten(1)
        if groups == 1:
            nodes = first[1] + torch.arange(weight.shape[1])
            self.marks.sink(nodes, convolution=True)
            self.labels.meet(nodes[:, None], channels)
        else:
            each = self.labels.along(channels.reshape(groups, -1), [1])
            self.labels.meet(each.expand(groups, weight.shape[0] // groups).reshape(-1), outputs)
        labels = channelwise(outputs, out.dim())
        if isinstance(bias, Tensor):
            labels = self.labels.meet(labels, channelwise(self.labels.full(bias), out.dim()))
        return labels.expand(out.shape)


def channelwise(labels: Tensor, dims: int) -> Tensor:
    """[channels] as [1, channels, 1, …]."""
    return labels.view([1, -1] + [1] * (dims - 2))


def thin_rows(rows: Tensor) -> list[Tensor]:
    """[1, n] where all rows are alike."""
    alike = rows.stride(0) == 0 or bool((rows == rows[:1]).all()) if len(rows) else False
    return [rows[:1] if alike else rows]


def _lines(part: Tensor, label: int) -> int:
    """In how many rows, or columns, of a slice a label stands: of channels one each."""
    at = (part[0] == label) & (part[0] < CODES)
    return min(int(at.any(0).sum()) or 1 << 60, int(at.any(1).sum()) or 1 << 60)
