"""What the pruning methods share: schedule, budget, unit masks, resume.

A *unit mask* cuts only the columns of the sinks that belong to the unit (of the attention output
for a head, of fc_out for a channel). That is exactly the network without the unit, and its
gradient dL/d(W ⊙ M) still says what the unit would do, so a masked unit can come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.compress.base import Batch, LossFn, MasterView
from mptrain.compress.prune.masked import MaskedWeights
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Axis, Block, Kept, Structure
from mptrain.compress.structure.budget import Budget, Importance
from mptrain.compress.structure.shrink import check_not_shared
from mptrain.core.errors import UserError
from mptrain.recipe import Curvature, Fisher, Keep, Magnitude, Movement, Schedule

REFRESHES = 100
"""Times that unit masks are searched anew during a warm-up, at most."""


@dataclass(frozen=True)
class Warmup:
    """Steps [start, end) of a phase in which the masks close; they are final from `end` on.

    end 0: no warm-up, prune at once.
    """

    start: int
    end: int

    @classmethod
    def of(cls, schedule: Schedule, *, phase_steps: int, steps_per_epoch: int) -> Warmup:
        unit = steps_per_epoch if schedule.unit == "epoch" else 1
        start, end = round(schedule.start * unit), min(round(schedule.end * unit), phase_steps)
        if schedule.end > 0 and start >= end:
            raise UserError(
                f"prune.schedule: the warm-up from {schedule.start:g} to {schedule.end:g} {schedule.unit}s has no"
                f" step: it begins at step {start} and ends at {end}. Make it longer, or train for more steps."
            )
        return cls(start, end)

    def progress(self, step: int) -> float:
        """0 until the warm-up, 1 from its end on."""
        if self.end == 0:
            return 1.0
        return min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))

    def ease(self, step: int) -> float:
        """Cubic schedule (Zhu and Gupta 2017): 1 - (1 - p)^3."""
        return 1.0 - (1.0 - self.progress(step)) ** 3

    def refreshes(self, step: int) -> bool:
        every = max(1, (self.end - self.start) // REFRESHES)
        return self.start < step < self.end and (step - self.start) % every == 0


class Pruner:
    """A `TrainingMethod`; subclasses say how important units are. `boundary.cut` ends what it began.

    structure: of the model that `prepare` gets. phase_steps: optimizer steps of the phase;
    the warm-up ends with it at the latest. steps_per_epoch: optimizer steps. lr: the
    stage's. length: tokens or `costs.Extent`s for keep.macs. whole: what the exported model
    costs, for keep.latency and keep.size. drop: names of blocks that may be left out whole.
    """

    name: ClassVar[str]

    def __init__(
        self,
        config: Movement | Fisher | Magnitude | Curvature,
        *,
        structure: Structure,
        phase_steps: int,
        steps_per_epoch: int,
        lr: float = 0.0,
        length: costs.Length = 128,
        whole: costs.Whole | None = None,
        drop: frozenset[str] = frozenset(),
    ) -> None:
        if not structure.prunable():
            raise UserError("prune.ignore leaves no attention and no FFN to prune: make its patterns narrower")
        self.config = config
        self.structure = structure
        self.lr = lr
        self.warmup = Warmup.of(config.schedule, phase_steps=phase_steps, steps_per_epoch=steps_per_epoch)
        self.budget = Budget(
            structure,
            config.keep or Keep.model_validate({"encoder_params": 1.0}),
            min_heads=config.min_heads,
            min_ffn=config.min_ffn,
            round_ffn=config.round_ffn,
            length=length,
            whole=whole,
            drop=drop,
        )
        self.masked: MaskedWeights
        self._step = 0
        self._kept = Kept()  # of the present unit masks
        self._masks: dict[str, Tensor] = {}  # by parameter
        self._settled: Kept | None = None

    # -- what a method defines

    def importance(self) -> Importance:
        """Non-negative importance of every prunable unit now."""
        raise NotImplementedError

    def observe(self) -> None:
        """Gradients are complete; `masked.dense` has the weights they belong to."""

    def collect(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn | None = None) -> None:
        """A calibration pass before `kept()`, for methods that need one to prune at once."""

    def refit(self, model: nn.Module, kept: Kept) -> None:
        """At the boundary, before the cut: change the weights that stay, in place."""

    def masked_parameters(self) -> list[str]:
        return list(dict.fromkeys(axis.parameter for block in self.structure.prunable() for axis in block.sinks))

    # -- TrainingMethod

    def prepare(self, model: nn.Module) -> nn.Module:
        """Begin to act on a model, on its device; a resume follows with `load_state_dict`."""
        check_not_shared(model, self.structure.prunable())
        self.masked = MaskedWeights({name: model.get_parameter(name) for name in self.masked_parameters()})
        self._step = 0
        self._set_kept(Kept())
        return model

    def at(self, step: int) -> dict[str, float]:
        """Settings that rule the forward pass after `step` optimizer steps; pure."""
        return {"progress": self.warmup.progress(step), "ease": self.warmup.ease(step)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def gradients(self, usable: bool) -> None:
        if usable:
            self.observe()
        self.masked.gradients_ready()

    def follow(self, masters: MasterView | None) -> None:
        self.masked.follow(masters)

    def updated(self, step: int) -> None:
        self._step = step
        self.masked.take_update()
        self.next_masks(step)
        self.masked.apply(self._masks)

    def logs(self) -> dict[str, float]:
        return {"compress/sparsity": self.sparsity()}

    def state_dict(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self._step)}
        state |= {f"dense.{name}": dense.detach().cpu().clone() for name, dense in self.masked.dense.items()}
        return state | {f"kept.{name}": torch.tensor(units) for name, units in self._kept.units.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly: also puts W ⊙ M into the model's parameters."""
        self._step = int(state["step"])
        kept = {n.removeprefix("kept."): t.tolist() for n, t in state.items() if n.startswith("kept.")}
        self._set_kept(Kept(kept))
        self.masked.load_dense({n.removeprefix("dense."): t for n, t in state.items() if n.startswith("dense.")})
        self.masked.apply(self._masks)

    # -- unit masks and the boundary

    def next_masks(self, step: int) -> None:
        """Choose the masks for the forward pass after `step` optimizer steps.

        From the end of the warm-up on they are the final structure: what trains is the shrunk model.
        """
        if 0 < step == self.warmup.end:
            self._set_kept(self.resolve())
        elif self.warmup.refreshes(step):
            self._set_kept(self.budget.search(self.importance(), self.warmup.ease(step)))

    def resolve(self) -> Kept:
        """The final structure, from the present importances."""
        return self.budget.search(self.importance())

    @property
    def resolved(self) -> bool:
        return 0 < self.warmup.end <= self._step

    def _set_kept(self, kept: Kept) -> None:
        """Unit masks that leave `kept`."""
        self._kept, self._masks = kept, {}
        for block in self.structure.prunable():
            for axis in block.sinks if kept.cuts(block) else ():
                dense, name = self.masked.dense[axis.parameter], axis.parameter
                mask = kept_mask(axis, kept.of(block), dense.dim()).to(dense.device)
                self._masks[name] = self._masks[name] & mask if name in self._masks else mask

    def sparsity(self) -> float:
        """Fraction of the parameters of all blocks that the masks remove."""
        left = sum(costs.params(block, self._kept.count(block)) for block in self.structure)
        return 1.0 - left / sum(costs.params(block, block.units) for block in self.structure)

    def restore_dense(self) -> None:
        """Every weight dense again; the masks no longer act."""
        self.masked.restore()

    def settle(self, kept: Kept) -> None:
        """The final structure is this one, whatever importances say."""
        self._settled = kept

    def kept(self) -> Kept:
        """The final structure; before the end of a warm-up what it would be now."""
        if self._settled is not None:
            return self._settled
        return self._kept if self.resolved else self.resolve()


def kept_mask(axis: Axis, units: Sequence[int], dims: int) -> Tensor:
    """True where `units` or no unit at all has its place; bool, of size 1 in all but the axis's dimension."""
    alive = torch.zeros(axis.size, dtype=torch.bool)
    alive[torch.from_numpy(axis.kept(units))] = True
    return alive.view([-1 if d == axis.dim else 1 for d in range(dims)])


def by_unit(axis: Axis, values: Tensor) -> Tensor:
    """What each unit has of a tensor of the parameter's shape: [units, elements]."""
    index = torch.from_numpy(axis.indices).to(values.device)
    return values.movedim(axis.dim, 0)[index.flatten()].reshape(len(index), -1)


def unit_sums(axis: Axis, values: Tensor) -> Tensor:
    """Sum of what each unit has of a tensor of the parameter's shape: [units]."""
    along = values.sum([d for d in range(values.dim()) if d != axis.dim]) if values.dim() > 1 else values
    return along[torch.from_numpy(axis.indices).to(values.device)].sum(1)


def sink_sums(block: Block, of: Callable[[str], Tensor | None]) -> Tensor | None:
    """`unit_sums` over all sinks of a block. of: the values by name of the parameter; None for those that have none."""
    total = None
    for axis in block.sinks:
        if (values := of(axis.parameter)) is not None:
            sums = unit_sums(axis, values)
            total = sums if total is None else total + sums.to(total.device)
    return total


def as_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
