"""Training through the rounding of weight-only integers: what a step computes is what the file will hold.

Scales and zero points stay as the method found them. Forward and backward see, for each dense weight w,

    q = clip(round(w / s) + z, lo, hi)        ŵ = (q - z) · s

and the optimizer updates w with dL/dŵ (straight-through: Bengio et al. 2013, arXiv 1308.3432). Training begins with the
integers of the method, GPTQ's too, which are not those next to w: each w starts at the point of its integer's cell that
is nearest to the dense weight, and a little inside, so that the first steps do not undo at once what GPTQ had chosen.
After each step w is put back into the reach of its levels, where it would else drift away unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.base import MasterView
from mptrain.compress.weights.grid import Grid, check_finite, to_levels
from mptrain.compress.weights.records import BlockQuantized, matrix
from mptrain.compress.weights.shown import ShownWeights
from mptrain.core.errors import ModelError
from mptrain.recipe import RoundedTraining


class RoundedTrainer:
    """A `TrainingMethod`: the integers of records that `weight_only.compress` made; `records` ends it.

    found: by name, of weights of the model that `prepare` gets, which holds their values. dense: the weights that they
    were made of, as the parameters hold them.
    """

    name = "integers"

    def __init__(
        self,
        found: Mapping[str, BlockQuantized],
        dense: Mapping[str, Tensor],
        config: RoundedTraining = RoundedTraining(),  # noqa: B008 (frozen)
    ) -> None:
        self.config = config
        self._start = dict(found)
        self._begin = dict(dense)

    @torch.no_grad()
    def prepare(self, model: nn.Module) -> nn.Module:
        parameters = {name: model.get_parameter(name) for name in self._start}
        self.weights = ShownWeights(parameters, self._shown)
        self._units = {name: _Units(record, parameters[name].device) for name, record in self._start.items()}
        for name, units in self._units.items():
            reach = units.whole(self.config.inside * units.scale[..., None])
            shown, dense = parameters[name].detach(), self._begin[name].to(parameters[name].device)
            first = torch.clamp(dense, shown - reach.view_as(shown), shown + reach.view_as(shown))
            self.weights.dense[name].copy_(first)
        self._begin = {}
        self.weights.show()
        return model

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def gradients(self, usable: bool) -> None:
        self.weights.gradients_ready()

    def follow(self, masters: MasterView | None) -> None:
        self.weights.follow(masters)

    def updated(self, step: int) -> None:
        for name, units in self._units.items():
            units.keep_in_reach(self.weights.trained(name))
        self.weights.take_update()
        self.weights.show()

    @torch.no_grad()
    def records(self) -> dict[str, BlockQuantized]:
        """Of the weights as they are trained now; `records.attach` puts them on the model. Raises ModelError for those
        that are not finite, as the last step may leave them: no loss says so any more."""
        for name, weight in self.weights.dense.items():
            try:
                check_finite(weight)
            except ModelError as error:
                raise ModelError(f"{name}: {error}") from None
        return {name: replace(start, q=self._integers(name)) for name, start in self._start.items()}

    def logs(self) -> dict[str, float]:
        """The share of integers that are no longer those of the start."""
        pairs = [(self._integers(name), start.q) for name, start in self._start.items()]
        moved = sum(int((now != before).sum()) for now, before in pairs)
        return {"compress/moved": moved / max(1, sum(now.numel() for now, _ in pairs))}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"dense.{name}": dense.detach().cpu().clone() for name, dense in self.weights.dense.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly: also puts the rounded values into the model's parameters."""
        self.weights.load_dense({name: state[f"dense.{name}"] for name in self.weights.dense})
        self.weights.show()

    @torch.no_grad()
    def _integers(self, name: str) -> Tensor:
        """As a record holds them."""
        start, q = self._start[name], self._units[name].levels(self.weights.dense[name])
        return q.flatten(1).to("cpu", start.q.dtype).reshape(start.shape).contiguous()

    def _shown(self, name: str) -> Tensor:
        return self._units[name].rounded(self.weights.dense[name])


class _Units:
    """The scales of a record and what they are of: [out, blocks, block], one unit to a scale."""

    def __init__(self, record: BlockQuantized, device: torch.device) -> None:
        self.scale = record.scale.to(device)
        self.zero = torch.zeros_like(self.scale) if record.zero is None else record.zero.to(device).float()
        self.grid = Grid(bits=record.bits, symmetric=record.zero is None)
        self.shape, self.transposed = record.shape, record.transposed

    def of(self, weight: Tensor) -> Tensor:
        """Of a weight as its parameter holds it; shares memory."""
        return matrix(weight, self.transposed).unflatten(1, (self.scale.shape[1], -1))

    def whole(self, units: Tensor) -> Tensor:
        """As a parameter would hold it; units: of this shape, or with axes of one."""
        out, columns = self.shape
        blocks = self.scale.shape[1]
        return matrix(units.expand(out, blocks, columns // blocks).flatten(1), self.transposed).contiguous()

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest integers, as floats, in units."""
        return to_levels(self.of(weight).float(), self.scale, self.zero, self.grid)

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight as the record of these integers gives it (records.BlockQuantized.dense), to the bit."""
        return self.whole((self.levels(weight) - self.zero[..., None]) * self.scale[..., None])

    def keep_in_reach(self, weight: Tensor) -> None:
        """At most half a level beyond the outermost ones, in place."""
        (low, high), scale, zero = self.grid.levels, self.scale[..., None], self.zero[..., None]
        self.of(weight).clamp_(scale * (low - 0.5 - zero), scale * (high + 0.5 - zero))
