"""The optimizer's state, in torch's own format, as views of flat buffers.

`optimizer.state[master]` holds what torch.optim would put there (`step`, `exp_avg`, `exp_avg_sq`, or
`momentum_buffer`), made at a parameter's first update like torch does, so its state_dict is one that
the plain optimizer reads and writes. Moments of 8 bits stand there as codes, with the exponents of their
blocks; `moments8.plain` makes them what torch reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.precision import moments8
from mptrain.precision.flat import Entry, Flat
from mptrain.precision.step import AdamRule, Rule


def link(optimizer: torch.optim.Optimizer, flat: Flat, entries: Iterable[Entry], names: Iterable[str]) -> None:
    """Point the state of entries at the flat buffers; after their first update."""
    for entry in entries:
        state: dict[str, Any] = {name: flat.tensor(flat.state(name), entry) for name in names}
        if flat.coded:
            state |= {moments8.EXPONENTS[name]: _exponents(flat, name, entry) for name in names}
            state[moments8.STRIDE] = list(entry.stride)
        if "exp_avg" in state:
            state["step"] = flat.steps[entry.index]
        optimizer.state[entry.master] = state


def take_over(optimizer: torch.optim.Optimizer, flat: Flat, rule: type[Rule]) -> None:
    """Move the state that an optimizer already has (it trained before, or was loaded) into the flat buffers."""
    for entry in flat.entries:
        state = optimizer.state.get(entry.master)
        if entry.group is None or not state:
            continue
        if not flat.coded or state.get(moments8.STRIDE) != list(entry.stride):  # blocks are in memory order
            state = moments8.decoded(state)
        names = [n for n in ("exp_avg", "exp_avg_sq", "momentum_buffer") if isinstance(state.get(n), Tensor)]
        for name in names:
            if flat.coded and not moments8.is_coded(state):
                _encode(flat, name, entry, state[name])
                continue
            view = flat.view(flat.state(name), entry)
            if view.data_ptr() != state[name].data_ptr():
                view.copy_(state[name])
                if flat.coded:
                    _exponents(flat, name, entry).copy_(state[moments8.EXPONENTS[name]])
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
    if moments8.is_coded(state):
        if state[moments8.FIRST].shape == new.shape:
            optimizer.state[new] = state
            return
        state = moments8.decoded(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != new.shape:
            grown = value.new_zeros(new.shape)
            overlap = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, new.shape))
            grown[overlap] = value[overlap]
            state[name] = grown
    optimizer.state[new] = state


def load(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, which would make fp32 of codes, four times as large, on the way."""
    coded = {index: state for index, state in state_dict["state"].items() if moments8.is_coded(state)}
    steps = {index: {"step": state["step"]} for index, state in coded.items()}
    groups = state_dict["param_groups"]
    optimizer.load_state_dict({"state": {**state_dict["state"], **steps}, "param_groups": groups})
    order = (p for group in optimizer.param_groups for p in group["params"])
    for index, parameter in zip((i for group in groups for i in group["params"]), order):
        if index in coded:
            optimizer.state[parameter] = {**coded[index], **optimizer.state[parameter]}


def decode(optimizer: torch.optim.Optimizer) -> None:
    """fp32 moments for an optimizer that goes on without flat buffers."""
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = moments8.decoded(state)


def _exponents(flat: Flat, name: str, entry: Entry) -> Tensor:
    blocks = slice(entry.offset // moments8.BLOCK, -(-(entry.offset + entry.numel) // moments8.BLOCK))
    return flat.state(moments8.EXPONENTS[name])[blocks]


def _encode(flat: Flat, name: str, entry: Entry, values: Tensor) -> None:
    """fp32 values, in the entry's shape, to the codes nearest to them."""
    exponents = _exponents(flat, name, entry)
    blocks = torch.zeros(len(exponents) * moments8.BLOCK, device=flat.device)
    blocks.as_strided(entry.shape, entry.stride).copy_(values)
    codes, tops = moments8.encode(name, blocks)
    entry.part(flat.state(name)).copy_(codes[: entry.numel])
    exponents.copy_(tops)
