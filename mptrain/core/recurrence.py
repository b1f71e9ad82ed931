"""A recurrence over time steps that is still a loop in an exported file.

    h_t = cell(x_t, h_{t−1}),   t = 1, 2, …

In torch a loop in Python runs the cell, and gradients go through it as through any other code. A converter that traces
such a loop writes as many steps as its example has, and the file is wrong for any other length. So while a model is
converted, `replaced` lets each recurrence of it give one operation in place of its steps, of which the format makes a
loop of its own, with the cell as its body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError

StandIn = Callable[[Tensor, Tensor, int], Tensor]
"""(x, state, number of the recurrence) to what stands for all its states, [batch, steps, size]"""


class Recurrence(nn.Module):
    """All states of a cell that reads a sequence step by step.

    cell: a module, called as cell(x_t [batch, …], state [batch, size]) and giving the next state, in the shape of the
    one before; it keeps nothing between calls. What it computes of x alone is faster before the recurrence, for all
    steps at once. Where a state is to be held, as at padding, the cell has to give back the one it got: let it read
    what says so with x.

    - Shapes and dtypes: x float [batch, steps, features], state float [batch, size], the first one; the result is
      float [batch, steps, size]. At least one step.
    - Units: as the cell's.
    - Raises ModelError for a cell with a recurrence inside, or for a sequence without steps.
    - Source: Elman 1990; exported as a TensorIterator of OpenVINO and a Loop of ONNX, other formats write the steps out
      for their one length.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, Recurrence) for module in cell.modules()):
            raise ModelError("a Recurrence inside the cell of another one is not supported: write one cell of both")
        self.cell = cell
        self._stand_in: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Raises ModelError for a sequence without steps."""
        if self._stand_in is not None:
            return self._stand_in(x, state)
        if x.shape[1] == 0:
            raise ModelError("a Recurrence needs a sequence of at least one step, got none")
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, 1)


@dataclass
class Step:
    """One recurrence of a model: its place there, its cell, and, once the model has run, the sizes of what it reads."""

    name: str
    cell: nn.Module
    features: int = 0
    size: int = 0

    def example(self) -> tuple[Tensor, Tensor]:
        """Of x_t and the state, two rows."""
        return torch.zeros(2, self.features), torch.zeros(2, self.size)


def recurrences(model: nn.Module) -> dict[str, Recurrence]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Recurrence)}


@contextmanager
def replaced(model: nn.Module, stand_in: StandIn) -> Iterator[list[Step]]:
    """Each recurrence of the model gives what `stand_in` makes; in the list, by their numbers, what these stand for."""
    found = recurrences(model)
    steps = [Step(name, module.cell) for name, module in found.items()]

    def given(number: int) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, state: Tensor) -> Tensor:
            steps[number].features, steps[number].size = int(x.shape[-1]), int(state.shape[-1])
            return stand_in(x, state, number)

        return run

    for number, module in enumerate(found.values()):
        module._stand_in = given(number)
    try:
        yield steps
    finally:
        for module in found.values():
            module._stand_in = None
