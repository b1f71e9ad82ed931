"""The fp32 masters of a model: one `Flat` for each (device, dtype) of its parameters.

A parameter keeps its identity when it becomes half, so ties, hooks and references stay good.
After that its `.data` is never assigned again: a new dtype would drop the gradient accumulator
and with it DDP's hook, and gradients would silently no longer be averaged. Where the model has to
be seen in fp32 (saving, loading, resizing) the slots of its modules are swapped instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError
from mptrain.precision.flat import Entry, Flat
from mptrain.precision.policy import Kept, Policy, kept_in_fp32

MASTER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Changed:
    """A parameter that was replaced or resized from outside: what it is now, with its fp32 values."""

    entry: Entry
    parameter: nn.Parameter
    values: Tensor


class Masters:
    """Builds the buffers and maps between the model and them.

    trained: the optimizer's parameters with the index of their group, in its order. Parameters of the
    optimizer that are not the model's (learned masks) are kept in fp32. A frozen parameter gets a
    master too, so that its fp32 values are not lost, unless it has the compute dtype already.
    """

    def __init__(self, model: nn.Module, policy: Policy, trained: Sequence[tuple[nn.Parameter, int]]) -> None:
        self.model = model
        self.kept: Kept = kept_in_fp32(model, policy)
        group_of = {id(p): group for p, group in trained}
        members = {id(p): (name, p) for name, p in model.named_parameters()}
        for index, (p, group) in enumerate(trained):
            if id(p) not in members:
                self.kept.parameters.add(id(p))
                members[id(p)] = (f"optimizer.{group}.{index}", p)
        order = sorted(members, key=lambda i: group_of.get(i, len(trained)))
        by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[str, nn.Parameter, int | None]]] = {}
        for key in order:
            name, p = members[key]
            dtype = _target(name, p, key in group_of, key in self.kept.parameters, policy)
            if dtype is not None:
                by_kind.setdefault((p.device, dtype), []).append((name, p, group_of.get(key)))
        kind = {"split": policy.master == "split", "coded": policy.moments == "int8"}
        self.flats = [Flat(device, dtype, m, **kind) for (device, dtype), m in by_kind.items()]
        self.by_name: dict[str, tuple[Flat, Entry]] = {e.name: (f, e) for f in self.flats for e in f.entries}
        self.by_id: dict[int, tuple[Flat, Entry]] = {id(e.parameter): (f, e) for f in self.flats for e in f.entries}
        self._structure = list(_links(model))
        self._addresses = [(e.parameter, e.parameter.data_ptr()) for f in self.flats for e in f.entries]

    def sync(self) -> None:
        for flat in self.flats:
            flat.sync()

    def read(self, *, trained: bool = False) -> dict[str, Tensor]:
        """fp32 values by parameter name, or of what is trained only; the masters' own memory, or joined when split."""
        return {n: f.read_master(e) for n, (f, e) in self.by_name.items() if e.group is not None or not trained}

    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            flat, entry = self.by_name[name]
            flat.write_master(entry, value)

    def frozen(self) -> int:
        """A sum over the bits of the fp32 values that no optimizer trains, split or not."""
        total = 0
        for flat in self.flats:
            *high, low = (int(bits[flat.trained :].sum(dtype=torch.int64)) for bits in flat.bits)
            total += low + (sum(high) << 16)
        return total

    # -- the model in fp32

    @contextlib.contextmanager
    def exposed(self, write: bool) -> Iterator[list[Changed]]:
        """Put fp32 parameters into the model's slots.

        Values that were replaced, and with `write` all values, are taken over at the end. The
        yielded list then holds the parameters whose shape is another one.
        """
        stand_ins = {
            id(e.parameter): nn.Parameter(f.read_master(e), e.parameter.requires_grad) if f.split else e.master
            for f in self.flats
            for e in f.entries
        }
        addresses = {i: p.data_ptr() for i, p in stand_ins.items()}
        swapped = [slot for slot in slots(self.model) if id(slot[2]) in stand_ins]
        for module, name, parameter in swapped:
            module._parameters[name] = stand_ins[id(parameter)]
        changed: list[Changed] = []
        try:
            yield changed
        finally:
            now = dict(self.model.named_parameters())
            back = {id(p): self.by_id[i][1].parameter for i, p in stand_ins.items()}
            for name, (flat, entry) in self.by_name.items():
                stand_in = stand_ins[id(entry.parameter)]
                present = now.get(name, stand_in)
                written = present is not stand_in or present.data_ptr() != addresses[id(entry.parameter)]
                if present.shape != entry.shape:
                    parameter = entry.parameter if present is stand_in else present
                    changed.append(Changed(entry, parameter, present.detach().float()))
                elif written or (write and flat.split):
                    flat.write_master(entry, present.detach())
                    back[id(present)] = entry.parameter
            replaced = {id(c.entry.parameter) for c in changed if c.parameter is not c.entry.parameter}
            for module, name, parameter in swapped:
                if name in module._parameters and id(parameter) not in replaced:
                    module._parameters[name] = parameter
            for module, name, parameter in slots(self.model):  # modules that are new
                if id(parameter) in back:
                    module._parameters[name] = back[id(parameter)]
            if write:
                self.sync()

    # -- changes from outside

    def intact(self) -> bool:
        """Whether the model still has the modules and parameters it had, at their place in the buffers."""
        return (
            self.in_place()
            and all(table.get(name) is item for table, name, item in self._structure)
            and all(p.data_ptr() == address for p, address in self._addresses)
        )

    def in_place(self) -> bool:
        """The same, by a glance at one parameter of each buffer: what moves a model moves all of it."""
        return all(
            f.entries[0].parameter.data_ptr() == (f.master if f.half is None else f.half).data_ptr() for f in self.flats
        )

    @torch.no_grad()
    def changes(self) -> list[Changed]:
        """Parameters that were replaced, resized or cast while half (`resize_token_embeddings`, `float`).

        Their values are those that `Flat.explain` finds. One that was merely copied elsewhere (Accelerate's
        `model.to("cpu:0")`) is put back into the buffer at once; with its dtype unchanged that is safe also under DDP.
        """
        now = dict(self.model.named_parameters())
        found = []
        for name, (flat, entry) in self.by_name.items():
            present = now.get(name, entry.parameter)
            old = flat.view(flat.master if flat.half is None else flat.half, entry)
            if present is entry.parameter and present.data_ptr() == old.data_ptr():
                continue
            values = flat.explain(entry, present.detach())
            kind = (present.shape, present.dtype, present.device)
            if present is entry.parameter and kind == (old.shape, old.dtype, flat.device):
                flat.write_master(entry, values)
                present.data = flat.tensor(flat.master if flat.half is None else flat.half, entry)
                continue
            found.append(Changed(entry, present, values))
        return found

    @torch.no_grad()
    def dismantle(self, changed: Sequence[Changed] = ()) -> None:
        """Give every parameter an fp32 storage of its own; the buffers may be dropped afterwards."""
        values = {id(c.entry): c for c in changed}
        for flat in self.flats:
            for entry in flat.entries:
                if id(entry) in values:
                    values[id(entry)].parameter.data = values[id(entry)].values
                else:
                    entry.parameter.data = flat.read_master(entry).clone()


def _target(name: str, p: nn.Parameter, trained: bool, keep: bool, policy: Policy) -> torch.dtype | None:
    """dtype that a parameter is computed with; None when it is left alone."""
    if hasattr(p, "full_tensor"):
        raise ModelError(f"{name} is sharded (a DTensor) and masters need whole parameters: use DDP, or ShardedMasters")
    if p.dtype not in MASTER_DTYPES:
        if trained and p.requires_grad:
            raise ModelError(f"{name} is trained and must be fp32, fp16 or bf16, got {p.dtype}; cast it or freeze it")
        return None
    target = torch.float32 if keep else policy.dtype
    return target if trained or p.dtype != target else None


def slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every place a parameter is registered at; a tied parameter has several."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _links(model: nn.Module) -> Iterator[tuple[dict, str, nn.Module | nn.Parameter | None]]:
    for module in model.modules():
        for table in (module._modules, module._parameters):
            for name, item in table.items():
                yield table, name, item
