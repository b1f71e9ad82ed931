"""The optimizer's state, in torch's own format, as views of flat buffers.

`optimizer.state[master]` holds what torch.optim would put there (`step`, `exp_avg`, `exp_avg_sq`, or
`momentum_buffer`), made at a parameter's first update like torch does, so its state_dict is one that
the plain optimizer reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.precision.flat import Entry, Flat
from mptrain.precision.step import AdamRule, Rule


def link(optimizer: torch.optim.Optimizer, flat: Flat, entries: Iterable[Entry], names: Iterable[str]) -> None:
    """Point the state of entries at the flat buffers; after their first update."""
    for entry in entries:
        state: dict[str, Any] = {name: flat.tensor(flat.state(name), entry) for name in names}
        if "exp_avg" in state:
            state["step"] = flat.steps[entry.index]
        optimizer.state[entry.master] = state


def take_over(optimizer: torch.optim.Optimizer, flat: Flat, rule: type[Rule]) -> None:
    """Move the state that an optimizer already has (it trained before, or was loaded) into the flat buffers."""
    for entry in flat.entries:
        state = optimizer.state.get(entry.master)
        if entry.group is None or not state:
            continue
        names = [n for n in ("exp_avg", "exp_avg_sq", "momentum_buffer") if isinstance(state.get(n), Tensor)]
        for name in names:
            view = flat.view(flat.state(name), entry)
            if view.data_ptr() != state[name].data_ptr():
                view.copy_(state[name])
        flat.steps[entry.index] = float(state["step"]) if rule is AdamRule else float(bool(names))
        link(optimizer, flat, [entry], names)


def move(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Make `new` take the place of `old` in the optimizer, state included.

    Where their shapes differ the state keeps the overlap; what was added starts at zero.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != new.shape:
            grown = value.new_zeros(new.shape)
            overlap = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, new.shape))
            grown[overlap] = value[overlap]
            state[name] = grown
    optimizer.state[new] = state
