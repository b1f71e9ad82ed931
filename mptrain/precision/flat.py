"""The flat buffers of one (device, dtype): fp32 masters and the half weights that forward sees.

    master   [n] fp32           what the optimizer updates
    half     [n] fp16 or bf16   the model's parameters are views of it
    low      [n] int16          instead of `master` when split: half is the master's high half

and the optimizer's moments [trained], fp32 or in 8 bits (moments8.py).

So a sync is one `half.copy_(master)`, whatever the number of parameters, and a step walks
contiguous memory. Parameters kept in fp32 live in a Flat of dtype fp32, whose master they
view directly. The trained parameters come first, in the optimizer's order, then the frozen.
A view that others get to see has a storage of its own over that memory: who takes "same storage" for
"same tensor" (safetensors, Accelerate) finds no ties, and a file of one tensor holds one.

Setting up moves the weights: each parameter is copied into the master and its own storage is
freed when its view replaces it, before the half buffer exists. So the peak is twice the fp32
weights, and what stays is 4 + 2 bytes a parameter (split: 2 + 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from mptrain.precision import moments8
from mptrain.precision.split import join, split

ALIGN = 16  # elements: half views start at multiples of 32 bytes
BLOCK = 1 << 17  # elements of a cache-sized piece


@dataclass(eq=False)
class Entry:
    """One parameter in a Flat."""

    name: str
    parameter: nn.Parameter
    """the model's; a view of `half` (or of `master`, in an fp32 Flat)"""
    group: int | None
    """index of its optimizer group; None when no optimizer trains it"""
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    index: int
    """place in Flat.entries"""
    master: nn.Parameter = field(init=False)
    """what the optimizer holds: an fp32 view of `master`, or a stand-in without memory when split"""
    accumulated: bool = False
    """Flat.grad has gradients of this parameter for the coming step"""
    reduced: bool = False
    """... and they are summed over the ranks already; what autograd left in p.grad is in them"""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def part(self, buffer: Tensor) -> Tensor:
        """The entry's elements of a buffer, 1-d, in memory order."""
        return buffer[self.offset : self.offset + self.numel]


class Flat:
    """The buffers of one (device, dtype). members: (name, parameter, optimizer group or None)."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        members: Sequence[tuple[str, nn.Parameter, int | None]],
        *,
        split: bool = False,
        coded: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.split = split and dtype != torch.float32
        self.coded = coded and dtype != torch.float32
        """moments are codes of 8 bits; a block of them belongs to one parameter"""
        self.entries: list[Entry] = []
        self.trained = 0
        """elements up to which there are parameters that the optimizer trains"""
        offset = 0
        for index, (name, parameter, group) in enumerate(sorted(members, key=lambda m: m[2] is None)):
            stride = torch.empty_like(parameter, device="meta").stride()  # dense, keeps channels_last
            self.entries.append(Entry(name, parameter, group, offset, parameter.shape, stride, index))
            align = moments8.BLOCK if self.coded else ALIGN
            offset += -(-parameter.numel() // align) * align
            if group is not None:
                self.trained = offset
        self.numel = offset
        # tensors, or None where this kind of Flat has none
        self.master: Any = None
        self.half: Any = None
        self.low: Any = None
        self.states: dict[str, Tensor] = {}
        """moments [trained] fp32, or as moments8 has them, by the optimizer's name; made at the first step"""
        self.steps = torch.zeros(len(self.entries))
        """updates of each entry so far, as torch counts them: fp32, on the CPU"""
        self.grad: Tensor | None = None
        """accumulated gradients [trained] fp32; made when first needed"""
        self._move_in()

    @torch.no_grad()
    def _move_in(self) -> None:
        if self.split:
            self.half = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
            self.low = torch.zeros(self.numel, dtype=torch.int16, device=self.device)
            for entry in self.entries:
                self._write_split(entry, entry.parameter.detach())
                entry.parameter.data = self.tensor(self.half, entry)
                stand_in = torch.zeros((), device=self.device).expand(entry.parameter.shape)
                entry.master = nn.Parameter(stand_in, entry.parameter.requires_grad)
            return
        self.master = torch.zeros(self.numel, device=self.device)
        for entry in self.entries:
            view = self.tensor(self.master, entry)
            view.copy_(entry.parameter)
            entry.parameter.data = view
            entry.master = entry.parameter
        if self.dtype == torch.float32:
            return
        self.half = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        self.half.copy_(self.master)
        for entry in self.entries:
            entry.master = nn.Parameter(entry.parameter.detach(), entry.parameter.requires_grad)
            entry.parameter.data = self.tensor(self.half, entry)

    def view(self, buffer: Tensor, entry: Entry) -> Tensor:
        """The part of a buffer that belongs to an entry, in the parameter's shape."""
        return buffer.as_strided(entry.shape, entry.stride, entry.offset)

    def tensor(self, buffer: Tensor, entry: Entry) -> Tensor:
        """The same with a storage of its own over the same memory, where the device has DLPack: for others to keep."""
        view = self.view(buffer, entry)
        if view.device.type not in ("cpu", "cuda"):
            return view
        # DLPack normalises the strides of axes of one
        return from_dlpack(to_dlpack(view)).as_strided(entry.shape, entry.stride)

    @torch.no_grad()
    def sync(self) -> None:
        """half <- master, in place."""
        if self.master is not None and self.half is not None:
            self.half.copy_(self.master)

    @property
    def bits(self) -> list[Tensor]:
        """The masters as integers [n]: one tensor, or two when split."""
        if self.split:
            return [self.half.view(torch.int16), self.low]
        return [self.master.view(torch.int32)]

    def read_master(self, entry: Entry) -> Tensor:
        """fp32 values of one parameter: the master's own memory, or joined when split."""
        if self.split:
            return join(self.view(self.half, entry), self.view(self.low, entry))
        return self.tensor(self.master, entry)

    def explain(self, entry: Entry, present: Tensor) -> Tensor:
        """fp32 values of a parameter that was copied, cast or resized from outside to `present`.

        Where that still is the half weight, or the same in its new dtype, it came from there, so it is the master.
        """
        old = self.view(self.master if self.half is None else self.half, entry)
        values = present.float().clone()
        overlap = tuple(slice(0, min(a, b)) for a, b in zip(values.shape, old.shape))
        same = present[overlap] == old[overlap].to(present.dtype)
        values[overlap] = torch.where(same, self.read_master(entry)[overlap], values[overlap])
        return values

    @torch.no_grad()
    def write_master(self, entry: Entry, values: Tensor) -> None:
        """Set the master of one parameter, and its half weight."""
        if self.split:
            self._write_split(entry, values)
            return
        view = self.view(self.master, entry)
        if view.data_ptr() != values.data_ptr():
            view.copy_(values)
        if self.half is not None:
            self.view(self.half, entry).copy_(view)

    def _write_split(self, entry: Entry, values: Tensor) -> None:
        high, low = self.view(self.half, entry), self.view(self.low, entry)
        for rows in _pieces(values):  # temporaries of a piece, not of an embedding matrix
            split(values[rows].to(self.device, torch.float32), high[rows], low[rows])

    def state(self, name: str) -> Tensor:
        if name not in self.states:
            dtype, shared = moments8.BUFFERS[name] if self.coded else (torch.float32, 1)
            self.states[name] = torch.zeros(self.trained // shared, dtype=dtype, device=self.device)
        return self.states[name]

    def gradients(self) -> Tensor:
        if self.grad is None:
            self.grad = torch.zeros(self.trained, device=self.device)
        return self.grad


def _pieces(values: Tensor) -> Iterator[slice | tuple]:
    """Slices of the first dimension, about BLOCK elements each."""
    if values.dim() == 0 or values.numel() <= BLOCK:
        yield (...,)
        return
    rows = max(1, BLOCK * values.shape[0] // values.numel())
    for start in range(0, values.shape[0], rows):
        yield slice(start, start + rows)
