"""torch.export with free sizes, for every format that converts exported graphs.

export     torch.export; what it says of sizes becomes one sentence, a range that is too wide is narrowed
x[mask]    of the tokens that a mask marks, followed by a view and the last of each row, becomes a gather: the rows
           of x[mask] are a size that no converter knows (BART's and T5's classifiers, which read the end token);
           the assertions about that size go too
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError as SizeError
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from mptrain.core.errors import ExportError

aten: Any = torch.ops.aten
_ASSERTIONS = (
    *(aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten.sym_constrain_range.default),
    *(aten.sym_constrain_range_for_size.default, torch.sym_constrain_range_for_size, torch._check),
)


def export(model: nn.Module, wrapper: nn.Module, values: tuple[Tensor, ...], sizes: Any) -> tuple[ExportedProgram, Any]:
    """(graph, the sizes that it takes). Under torch.no_grad.

    model: named in messages. sizes: `dynamic_shapes` of torch.export; a Dim whose range the model takes a part of is
    narrowed to it.
    Raises ExportError where the forward pass computes for the sizes of the example alone.
    """
    try:
        graph = torch.export.export(wrapper, values, dynamic_shapes=sizes)
    except SizeError as error:
        sizes = _narrowed(error, sizes)
        if sizes is None:
            raise ExportError(_said(model, values, str(error))) from error
        graph = torch.export.export(wrapper, values, dynamic_shapes=sizes)
    _rewrite(graph.graph_module)
    return graph, sizes


def _narrowed(error: Exception, sizes: Any) -> Any:
    """None where a free size would not be free any more."""
    head, fixes, tail = str(error).partition("Suggested fixes:")
    lines = [line for line in tail.splitlines() if " = " in line]  # what follows them torch does not read itself
    try:
        found = refine_dynamic_shapes_from_suggested_fixes("\n".join([head + fixes, *lines]), sizes)
    except Exception:  # no suggestion, or one that this function of torch does not read
        return None
    dims = [dim for free in leaves(found) for dim in free.values()]
    return found if all(hasattr(dim, "min") for dim in dims) else None


def leaves(sizes: Any) -> list[dict[int, Any]]:
    """The free axes of each input, of `dynamic_shapes` in any nesting."""
    if isinstance(sizes, dict):
        return [sizes]
    return [leaf for inner in sizes for leaf in leaves(inner)] if isinstance(sizes, (tuple, list)) else []


def _said(model: nn.Module, values: tuple[Tensor, ...], message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines()]
    reason = next((line for line in lines if "pecializ" in line), lines[0] if lines else "")
    return one_size(model, values, f"torch.export says: {reason.split('. ')[0][:200]}")


def one_size(model: nn.Module, values: Iterable[Tensor], said: str) -> str:
    """What to tell of a model whose graph is right for the sizes of the example alone."""
    shapes = ", ".join(str(list(value.shape)) for value in values)
    return (
        f"the forward pass of {type(model).__name__} computes for the sizes of one example alone ({shapes}), as one"
        " that runs over its tokens in a loop does: an export with free sizes would be wrong for all others. Write the"
        " loop as a mptrain.Recurrence, which stays one; or take a Core ML export of one size (in a recipe: format:"
        " coreml, shapes: {kind: fixed, batch: [1], length: [128]})."
        f" {said}"
    )


def _rewrite(module: fx.GraphModule) -> None:
    """In place, before decompositions, which make a whole program of it again."""
    graph = module.graph
    marked = [(node, found) for node in _calls(graph, aten.index.Tensor) if (found := _last_of_rows(node)) is not None]
    for node, found in marked:
        _as_gather(graph, node, *found)
    if marked:
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and node.target in _ASSERTIONS and not node.users:
                graph.erase_node(node)
        graph.eliminate_dead_code()
    for node in _calls(graph, aten.scaled_dot_product_attention.default):
        _share_heads(graph, node)
    for node in _calls(graph, aten.adaptive_avg_pool1d.default):
        if list(node.args[1]) == [1]:  # type: ignore[arg-type]
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(aten.mean.dim, (node.args[0], [-1], True)))
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def _share_heads(graph: fx.Graph, node: fx.Node) -> None:
    query: Any = node.args[0]
    heads = query.meta["val"].shape[1]
    for place in (1, 2):
        shared: Any = node.args[place]
        shape = shared.meta["val"].shape
        if len(shape) == 4 and shape[1] == 1 != heads and not node.kwargs.get("enable_gqa"):
            with graph.inserting_before(node):
                node.update_arg(place, graph.call_function(aten.expand.default, (shared, [-1, heads, -1, -1])))


def _last_of_rows(node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """(x [n, length, d], mask [n, length], selects) of `x[mask].view(n, -1, d)[:, -1]`, else None."""
    x, indices = node.args[0], node.args[1]
    mask = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if not isinstance(x, fx.Node) or not isinstance(mask, fx.Node):
        return None
    of_x, of_mask = x.meta["val"], mask.meta["val"]
    views = [user for user in node.users if user.target in (aten.view.default, aten.reshape.default)]
    others = [user for user in node.users if user not in views and user.target is not aten.sym_size.int]
    if of_mask.dtype != torch.bool or of_x.dim() != 3 or of_mask.dim() != 2 or len(views) != 1 or others:
        return None
    made = views[0].meta["val"]
    selects = _selects(views[0])
    if made.dim() != 3 or str(made.shape[0]) != str(of_x.shape[0]) or selects is None:
        return None
    return x, mask, selects


def _selects(view: fx.Node) -> list[fx.Node] | None:
    """What takes the last of axis 1, through slices that take all; None where anything else reads the view."""
    found: list[fx.Node] = []
    for user in view.users:
        if user.target is aten.sym_size.int:
            continue
        if user.target is aten.slice.Tensor and user.args[1:] in ((0,), (0, 0, 2**63 - 1), (0, None, None)):
            inner = _selects(user)
            if inner is None:
                return None
            found += inner
        elif user.target is aten.select.int and tuple(user.args[1:]) == (1, -1):
            found.append(user)
        else:
            return None
    return found


def _as_gather(graph: fx.Graph, index: fx.Node, x: fx.Node, mask: fx.Node, selects: list[fx.Node]) -> None:
    """Rows have the same number of marked tokens, as the view needs: the last one is the greatest place."""
    call = graph.call_function
    with graph.inserting_before(index):
        length = call(aten.sym_size.int, (x, 1))
        places = call(aten.arange.default, (length,))
        marked = call(aten.mul.Tensor, (call(aten.to.dtype, (mask, torch.int64)), places))
        last = call(aten.unsqueeze.default, (call(aten.amax.default, (marked, [1], True)), 2))
        batch, width = call(aten.sym_size.int, (x, 0)), x.meta["val"].shape[2]
        where = call(aten.expand.default, (last, [batch, 1, width]))
        row = call(aten.select.int, (call(aten.gather.default, (x, 1, where)), 1, 0))
    for select in selects:
        select.replace_all_uses_with(row)
