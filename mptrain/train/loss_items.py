"""Whether a loss is divided by the number of items in the batch, or is the mean of its micro-batch.

With several micro-batches or ranks transformers asks a model whose `forward` takes keyword arguments to divide by
`num_items_in_batch`, and then divides no more itself. Many take them and ignore this one (BERT and all classifiers of
5.5), so that their loss and gradients become accumulation x ranks times as large. The graph of the first loss tells:
the number goes in as a leaf that wants a gradient, and is found again when the loss was divided by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_leaf(items: Tensor | int, device: torch.device) -> Tensor:
    """The same number, scalar or one to a device, so that `depends_on` can find it."""
    return torch.as_tensor(items, device=device).detach().float().requires_grad_()


THROUGH = "RegisterPostBackwardFunctionBackward"
"""of FSDP2: hands every input of a module through, each to its own output"""


def depends_on(loss: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of `loss` reaches `leaf`."""
    seen: set[Any] = set()
    queue: list[Any] = [(loss.grad_fn, 0)]
    while queue:
        node, output = edge = queue.pop()
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if getattr(node, "variable", None) is leaf:
            return True
        queue += node.next_functions[output : output + 1] if node.name() == THROUGH else node.next_functions
    return False
