"""What each operation does to labels; one that is not known joins and freezes all it reads, so nothing false is found.

elementwise            labels of the operands meet
sum, norm, softmax     labels along the dimensions it works on meet
moves (cat, index, …)  the same operation runs on the labels
choices (topk, …)      what they compare is frozen
products               products.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mptrain.compress.structure.dataflow.labels import Labels, nodes_in, storage
from mptrain.compress.structure.dataflow.marks import Marks
from mptrain.compress.structure.dataflow.products import Products, channelwise
from mptrain.compress.structure.dataflow.record import Operation

_MOVES = frozenset(
    "cat stack index index_select gather repeat flip roll constant_pad_nd tril triu slice_scatter select_scatter"
    " scatter scatter_ index_put index_put_ repeat_interleave im2col unfold pixel_shuffle pixel_unshuffle unfold_copy"
    " take masked_select reflection_pad1d channel_shuffle".split()
)
_REDUCTIONS = frozenset(
    "sum mean amax amin var var_mean norm linalg_vector_norm _softmax _log_softmax cumsum logsumexp std max min all any"
    " prod _safe_softmax cumprod".split()
)
_POOLS = ("avg_pool", "max_pool", "upsample", "adaptive", "_cudnn_pool")
_CHOICES = frozenset("topk sort argmax argmin argsort multinomial bincount".split())
_PRODUCTS = frozenset("mm bmm matmul _grouped_mm grouped_mm_fallback".split())
"""the last is what transformers has for torch < 2.8"""
_CONVOLUTIONS = frozenset("convolution _convolution conv1d conv2d mkldnn_convolution".split())
_LAYER_NORMS = frozenset("native_layer_norm _fused_rms_norm rms_norm layer_norm".split())
_ADDITIONS = frozenset("index_add index_add_ scatter_add scatter_add_".split())
_STRAIGHT = frozenset(
    "add add_ sub sub_ neg copy_ clone _to_copy contiguous native_dropout dropout fill_ zero_ lift_fresh_copy"
    " _unsafe_view alias detach".split()
)
"""elementwise operations after which two matrices in a row are still one matrix"""


class Flow:
    """Labels and marks after all live operations."""

    def __init__(self, labels: Labels, operations: Sequence[Operation], results: Sequence[Tensor]) -> None:
        self.labels, self.marks = labels, Marks(labels)
        self._products = Products(labels, self.marks)
        self.unknown: set[str] = set()
        for operation in operations:
            if any(storage(t) in labels.of_storage for t in operation.inputs):
                try:
                    self._apply(operation)
                except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError):
                    self._freeze_all(operation)  # called in a way that no rule expects
        for result in results:
            self.marks.freeze(labels.full(result), "it reaches an output")

    def _apply(self, op: Operation) -> None:
        name, out = op.name, op.outputs[0]
        if name in _PRODUCTS:
            self.labels.put(out, self._products.matmul(op.args[0], op.args[1], out.shape))
        elif name in ("addmm", "baddbmm"):
            self.labels.put(out, self._plus(self._products.matmul(op.args[1], op.args[2], out.shape), op.args[0]))
        elif name == "linear":
            product = self._products.matmul(op.args[0], op.args[1].t(), out.shape)
            self.labels.put(out, self._plus(product, op.argument(2, "bias")))
        elif "scaled_dot_product" in name:
            self.labels.put(out, self._products.attention(op))
        elif name in _CONVOLUTIONS:
            self.labels.put(out, self._products.convolution(op))
        elif name == "embedding":
            self.labels.put(out, self._embedding(op.args[0], op.args[1], out))
        elif name in _LAYER_NORMS or name == "native_group_norm" or "batch_norm" in name:
            self.labels.put(out, self._norm(op))
        elif any(pool in name for pool in _POOLS):
            extent = 1 if "1d" in name else 3 if "3d" in name else 2
            self.labels.put(out, self.labels.along(self.labels.full(op.args[0]), range(-extent, 0)).expand(out.shape))
        elif name in _CHOICES:
            self.marks.freeze(self.labels.full(op.args[0]), f"{name} chooses between its channels")
        elif name in _ADDITIONS:
            both = torch.cat([self.labels.full(op.args[0]), self.labels.full(op.args[3])], op.args[1])
            self.labels.put(out, self.labels.along(both, [op.args[1]]).expand(out.shape))
        elif name in _REDUCTIONS:
            self._reduce(op)
        elif name == "glu":
            halves = self.labels.full(op.args[0]).chunk(2, op.argument(1, "dim", -1))
            self.labels.put(out, self._bent(self.labels.meet(*halves)))
        elif name in _MOVES:
            self._move(op)
        else:
            self._elementwise(op)

    def _bent(self, labels: Tensor) -> Tensor:
        self.marks.bend(labels)
        return labels

    def _plus(self, product: Tensor, other: Tensor | None) -> Tensor:
        if other is None:
            return product
        if self.labels.of(other) is None:
            self.marks.constant(other, product)
            return product
        return self.labels.meet(product, self.labels.full(other)).expand(product.shape)

    def _embedding(self, table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        row = self.labels.full(table[:1])[0]
        found = self.labels.nodes_along(row, taken=0)
        if found is None:
            return self.labels.full(table)[ids]
        self.marks.table(found[0])
        return found[0].expand(out.shape)

    def _norm(self, op: Operation) -> Tensor:
        """Labels after normalization; weights, biases and running sums are attached."""
        x = self.labels.full(op.args[0])
        if op.name in _LAYER_NORMS:
            found, own = self.labels.along(x, range(-len(op.args[1]), 0)).expand(x.shape), op.args[2:4]
            shaped = [self.labels.full(p) for p in own if isinstance(p, Tensor)]
        elif op.name == "native_group_norm":
            groups = op.args[6]
            each = self.labels.along(x.reshape(x.shape[0], groups, -1), [2])
            found = each.expand(-1, -1, x[0].numel() // groups).reshape(x.shape)
            shaped = [channelwise(self.labels.full(p), x.dim()) for p in op.args[1:3] if isinstance(p, Tensor)]
        else:
            found = x
            shaped = [channelwise(self.labels.full(p), x.dim()) for p in op.args[1:5] if isinstance(p, Tensor)]
        for labels in shaped:
            found = self.labels.meet(found, labels)
        return self._bent(found)

    def _reduce(self, op: Operation) -> None:
        x = self.labels.full(op.args[0])
        dims = op.argument(2 if "norm" in op.name else 1, "dim")
        dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        joined = self.labels.along(x, dims) if x.dim() else x
        if "softmax" in op.name:
            self.marks.attended(joined.squeeze(dims[0]), op.module)
        self._bent(joined)
        for out in op.outputs:
            self.labels.put(out, joined if out.shape == x.shape else joined.reshape(out.shape))

    def _move(self, op: Operation) -> None:
        first, *rest = op.args
        if op.name in ("cat", "stack"):
            args: list[Any] = [[self.labels.full(t) for t in first], *rest]
        else:
            args = [self.labels.full(first), *rest]
            for place, value in enumerate(op.args):
                values = (op.name.startswith("index_put") and place == 2) or "scatter" in op.name
                if place and values and isinstance(value, Tensor) and value.is_floating_point():
                    args[place] = self.labels.full(value)
        if op.name in ("tril", "triu"):
            self.labels.put(op.outputs[0], args[0])
            return
        if op.name == "constant_pad_nd":
            args = [args[0], args[1], -1]
        function = getattr(torch.ops.aten, op.name.rstrip("_"))
        kwargs = {key: value for key, value in op.kwargs.items() if key != "dtype"}
        if op.name in ("im2col", "reflection_pad1d", "pixel_shuffle", "pixel_unshuffle"):  # have no integer kernel
            found = function(args[0].double(), *args[1:], **kwargs).long()
        else:
            found = function(*args, **kwargs)
        self.labels.put(op.outputs[0], found)

    def _elementwise(self, op: Operation) -> None:
        out = op.outputs[0]
        inputs = op.inputs[1:] if op.name in ("copy_", "fill_", "zero_") else op.inputs
        if (len(op.outputs) > 1 and op.name != "native_dropout") or not all(_fits(t, out) for t in inputs):
            self._freeze_all(op)
            return
        found, constants = torch.full((1,) * out.dim(), -1), []
        for tensor in inputs:
            labels = self.labels.of(tensor)
            if labels is None:
                constants.append(tensor)
            else:
                found = self.labels.meet(found, labels)
        found = found.expand(out.shape)
        for tensor in constants:
            self.marks.constant(tensor, found)
        if op.name not in _STRAIGHT and not _scales(op, constants):
            self.marks.bend(found)
        self.labels.put(out, found)

    def _freeze_all(self, op: Operation) -> None:
        labels = torch.cat([self.labels.full(t).reshape(-1) for t in op.inputs])
        nodes = nodes_in(labels)
        if len(nodes):
            self.unknown.add(op.name)
            self.labels.join_all(nodes.tolist())
            self.marks.freeze(nodes, f"{op.name} is an operation that is not known")
            root = self.labels.root(int(nodes[0]))
            for out in op.outputs:
                self.labels.put(out, torch.full((1,) * out.dim(), root).expand(out.shape))


def _scales(op: Operation, constants: Sequence[Tensor]) -> bool:
    """A product with one number that no parameter made."""
    alone = len(op.inputs) - len(constants) == 1 and all(tensor.numel() == 1 for tensor in constants)
    return op.name in ("mul", "mul_", "div", "div_") and alone


def _fits(tensor: Tensor, out: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, out.shape) == out.shape
    except RuntimeError:
        return False
