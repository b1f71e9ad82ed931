"""Palettization-aware fine-tuning: the entries of the tables are trained.

With Ŵ = lut[group, index] · s in forward and backward, an entry's gradient is the sum over the
weights that use it,

    dL/dlut[g, k] = Σ_{i: group(i) = g, index(i) = k} s · dL/dŴᵢ

(Han et al. 2016, arXiv 1510.00149). Entries are an optimizer group of their own. Everything
that is not palettized trains as ever. The dense weights move too, by the straight-through
gradient dL/dŴ, unseen: every `refresh` steps each takes the entry nearest to it. With refresh 0
the assignments of the start stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.base import MasterView
from mptrain.compress.weights.palettize import as_half
from mptrain.compress.weights.records import Palettized, matrix
from mptrain.compress.weights.shown import ShownWeights
from mptrain.recipe import TableTraining


class TableTrainer:
    """A `TrainingMethod`: the tables of records that `palettize` made of the model's weights; `records` ends it.

    lr: the stage's, for tables unless config.lr says otherwise. The model holds its dense
    weights when `prepare` gets it.
    """

    name = "tables"

    def __init__(self, palettized: Mapping[str, Palettized], config: TableTraining, *, lr: float) -> None:
        self.config, self.lr = config, lr
        self._start = dict(palettized)
        self._moved = 0.0

    def prepare(self, model: nn.Module) -> nn.Module:
        self.weights = ShownWeights({name: model.get_parameter(name) for name in self._start}, self._shown)
        device = {name: weight.device for name, weight in self.weights.dense.items()}
        self.tables = {name: nn.Parameter(r.lut.to(device[name], copy=True)) for name, r in self._start.items()}
        self.indices = {name: r.indices.to(device[name], copy=True) for name, r in self._start.items()}
        self.scales = {
            name: None if r.per_channel_scale is None else r.per_channel_scale.to(device[name])
            for name, r in self._start.items()
        }
        self.weights.show()
        return model

    def parameter_groups(self) -> list[dict[str, Any]]:
        lr = self.lr if self.config.lr is None else self.config.lr
        return [{"params": list(self.tables.values()), "lr": lr, "weight_decay": 0.0}]

    @torch.no_grad()
    def gradients(self, usable: bool) -> None:
        for name, table in self.tables.items():
            gradient = self.weights.gradient(name) if usable else None
            table.grad = None if gradient is None else self._table_gradient(name, gradient)
        self.weights.gradients_ready()

    def follow(self, masters: MasterView | None) -> None:
        self.weights.follow(masters)

    def updated(self, step: int) -> None:
        self.weights.take_update()
        if self.config.refresh and step % self.config.refresh == 0:
            self._reassign()
        self.weights.show()

    def records(self) -> dict[str, Palettized]:
        """Of the weights as they are trained now, tables in fp16 numbers; `records.attach` puts them on the model."""
        return {
            name: Palettized(
                self.indices[name].cpu(),
                as_half(table.detach()).cpu(),
                self._start[name].rows_per_group,
                self._start[name].per_channel_scale,
                self._start[name].bits,
                self._start[name].transposed,
            )
            for name, table in self.tables.items()
        }

    def logs(self) -> dict[str, float]:
        return {"compress/reassigned": self._moved} if self.config.refresh else {}

    def state_dict(self) -> dict[str, Tensor]:
        state = {"moved": torch.tensor(self._moved, dtype=torch.float64)}
        kinds: dict[str, Mapping[str, Tensor]] = {
            "table": self.tables,
            "index": self.indices,
            "dense": self.weights.dense,
        }
        for kind, tensors in kinds.items():
            state |= {f"{kind}.{name}": t.detach().cpu().clone() for name, t in tensors.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly: also puts the tables' values into the model's parameters."""
        self._moved = float(state["moved"])
        for name in self.tables:
            self.tables[name].copy_(state[f"table.{name}"])
            self.indices[name].copy_(state[f"index.{name}"])
        self.weights.load_dense({name: state[f"dense.{name}"] for name in self.tables})
        self.weights.show()

    # -- one weight

    def _shown(self, name: str) -> Tensor:
        """Of the table and indices as they are now."""
        start = self._start[name]
        table = self.tables[name].detach()
        return Palettized(
            self.indices[name], table, start.rows_per_group, self.scales[name], start.bits, start.transposed
        ).weight()

    def _table_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """dL/dlut, [groups, 2^bits, dim], from dL/dŴ; summed in float64."""
        table, scale = self.tables[name], self.scales[name]
        groups, k, dim = table.shape
        by_weight = matrix(gradient, self._start[name].transposed).float()
        if scale is not None:
            by_weight = by_weight * scale
        first = k * (torch.arange(len(by_weight), device=table.device) // self._start[name].rows_per_group)
        positions = (self.indices[name] + first[:, None]).flatten()
        by_entry = by_weight.reshape(-1, dim).double()
        sums = [torch.bincount(positions, by_entry[:, d], minlength=groups * k) for d in range(dim)]
        return torch.stack(sums, 1).view_as(table).to(table.dtype)

    @torch.no_grad()
    def _reassign(self) -> None:
        """Each dense weight takes the entry of its table that is nearest."""
        moved = total = 0
        for name, table in self.tables.items():
            groups, _, dim = table.shape
            dense = matrix(self.weights.dense[name], self._start[name].transposed).float()
            if (scale := self.scales[name]) is not None:
                dense = dense / scale
            found = nearest(dense.reshape(groups, -1, dim), table.detach()).view_as(self.indices[name])
            moved += int((found != self.indices[name]).sum())
            total += found.numel()
            self.indices[name].copy_(found)
        self._moved = moved / total


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 [groups, n]: the entry of `table` [groups, k, dim] nearest to each of `values` [groups, n, dim]."""
    if table.shape[2] == 1:
        entries, order = table.squeeze(2).sort(1)
        middle = (entries[:, 1:] + entries[:, :-1]) / 2
        return order.to(torch.uint8).gather(1, torch.searchsorted(middle, values.squeeze(2).contiguous()))
    rows = max(1, (1 << 22) // table.shape[1])
    found = [
        torch.cat([torch.cdist(part, entries).argmin(1) for part in group.split(rows)])
        for group, entries in zip(values, table)
    ]
    return torch.stack(found).to(torch.uint8)
