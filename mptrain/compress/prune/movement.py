"""Movement pruning (Sanh et al. 2020, arXiv 2005.07683): keep what moves away from zero.

Every group of weights (a 32×32 block of an attention matrix, a row of fc_in, a column of
fc_out, parts of a bias; or with `score: shared` a whole head or channel) has a score S, zero
at first. The mask is a step function of S, and its gradient goes straight through it:

    dL/dS = Σ over the group of dL/d(W ⊙ M) · W

so S grows where a gradient step lets the weight grow. Two ways to choose M:

regularization, as NNCF 2.x has it. With p the fraction of the warm-up done, s = 1 - (1 - p)³:
    M = 1[S > min(τ, quantile(S, 0.98))],  τ = τ₀ + s · (0 - τ₀);  before the warm-up all ones
    loss += s · λ · mean over layers of ½ · (f · mean σ(S_weight) + f₀ · mean σ(S_bias))
    where f and f₀ are the weights and biases to a score. τ₀ is the k-th smallest score at the
    first warm-up step, k = 0.1% of all elements + 1. Quantile and k count every element of a
    group. The masks of the last warm-up step decide: a unit stays if any part of any of its
    matrices is alive.

keep, a target reached on the same cubic schedule:
    shared  whole units by σ(S) per parameter under the budget (budget.py)
    block   the best scores over all groups, so that 1 - s · (1 - keep) of the elements stay;
            at the end units by σ(mean S over their weights) under the budget

From the end of the warm-up on scores stay, and survivors are dense again: W never lost its values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.prune.base import Pruner, as_numpy, by_unit, sink_sums
from mptrain.compress.prune.scores import layout, quantile
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Block, Kept
from mptrain.compress.structure.budget import Importance
from mptrain.core.errors import UserError
from mptrain.recipe import Movement

MAX_QUANTILE = 0.98
START_SPARSITY = 0.001

log = logging.getLogger(__name__)


class MovementPruner(Pruner):
    name = "movement"
    config: Movement

    def __init__(self, config: Movement, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._tau0 = config.threshold
        self._regularization = torch.zeros(())
        if config.regularization is None:
            return
        if self.warmup.start == 0 and config.threshold is None:
            raise UserError(
                "prune: movement with regularization reads its first threshold from scores that have moved, so"
                " schedule.start must be at least one step (NNCF's recipes use one epoch); got 0. Set it, or give"
                " prune.threshold, a negative number."
            )
        if config.threshold is not None and config.threshold >= 0:
            log.warning(
                "prune.threshold is %g: scores start at 0, so everything is masked at once; use a negative number",
                config.threshold,
            )

    # -- scores

    def prepare(self, model: nn.Module) -> nn.Module:
        self._groups = layout(model, self.structure, self.config)
        super().prepare(model)
        device = next(iter(self.masked.dense.values())).device
        last = self._groups[-1]
        self.scores = nn.Parameter(torch.zeros(last.start + last.numel, device=device))
        layers = last.layer + 1
        self._elements = torch.zeros(len(self.scores), dtype=torch.int64, device=device)
        self._coefficient = torch.zeros(len(self.scores), device=device)  # of σ(S) in the regularizer, without s · λ
        for group in self._groups:
            group.of(self._elements).fill_(group.factor)
            group.of(self._coefficient).fill_(0.5 * group.factor / (group.numel * layers))
        self._tau0 = self.config.threshold
        self.next_masks(0)
        self.masked.apply(self._masks)
        return model

    def masked_parameters(self) -> list[str]:
        return list(dict.fromkeys(group.parameter for group in self._groups))

    def parameter_groups(self) -> list[dict[str, Any]]:
        lr = self.lr if self.config.score_lr is None else self.config.score_lr
        return [{"params": [self.scores], "lr": lr, "weight_decay": 0.0}]

    @torch.no_grad()
    def observe(self) -> None:
        if self.resolved:
            self.scores.grad = None  # optimizers then leave the scores alone
            return
        gradient = torch.zeros_like(self.scores)
        for group in self._groups:
            if self.config.score == "shared":
                found = sink_sums(self.structure[group.block], self.masked.product)
            else:
                product = self.masked.product(group.parameter)
                found = None if product is None else group.pool(product)
            if found is not None:
                group.of(gradient).copy_(found)
        if self.config.regularization is not None:
            scale = self.at(self._step)["regularization_factor"]
            alive = torch.sigmoid(self.scores.detach())
            gradient += scale * self._coefficient * alive * (1.0 - alive)
            self._regularization = scale * (self._coefficient * alive).sum()
        self.scores.grad = gradient

    # -- schedule

    def at(self, step: int) -> dict[str, float]:
        """Also the threshold τ (NaN while τ₀ is not known) and s · λ, for the regularization way."""
        settings = super().at(step)
        if self.config.regularization is not None:
            begun = step >= self.warmup.start
            tau0 = math.nan if self._tau0 is None else self._tau0
            settings["threshold"] = tau0 * (1.0 - settings["ease"]) if begun else -math.inf
            settings["regularization_factor"] = settings["ease"] * self.config.regularization
        return settings

    def next_masks(self, step: int) -> None:
        if step >= self.warmup.end or (self.config.regularization is None and self.config.score == "shared"):
            super().next_masks(step)
        elif self.config.regularization is None:
            if step > self.warmup.start:
                self._set_masks(self._alive_by_fraction(self.warmup.ease(step)))
        elif step >= self.warmup.start:
            if self._tau0 is None:
                self._tau0 = self._first_threshold()
            self._set_masks(self._alive_by_threshold(self.at(step)["threshold"]))

    @torch.no_grad()
    def _alive_by_threshold(self, tau: float) -> Tensor:
        """1[S > min(τ, quantile(S, 0.98))], the quantile over the elements of each weight or bias; bool, flat."""
        alive = torch.empty(len(self.scores), dtype=torch.bool, device=self.scores.device)
        for group in self._groups:
            scores = group.of(self.scores)
            highest = quantile(scores.flatten(), group.factor, MAX_QUANTILE)
            torch.gt(scores, highest.clamp(max=tau), out=group.of(alive))
        return alive

    @torch.no_grad()
    def _alive_by_fraction(self, ease: float) -> Tensor:
        """The best scores that hold 1 - ease · (1 - keep) of the elements, per budget; bool, flat."""
        alive = torch.ones(len(self.scores), dtype=torch.bool, device=self.scores.device)
        for limit in self.budget.limits:
            names = {block.name for block in limit.blocks}
            mine = torch.cat([torch.full((g.numel,), g.block in names) for g in self._groups]).nonzero().flatten()
            mine = mine.to(self.scores.device)
            order = mine[torch.sort(self.scores[mine], descending=True, stable=True).indices]
            elements = self._elements[order].cumsum(0)
            alive[order] = elements <= (1.0 - ease * (1.0 - limit.of_blocks)) * elements[-1]
        return alive

    @torch.no_grad()
    def _first_threshold(self) -> float:
        ordered, order = torch.sort(self.scores.detach())
        elements = self._elements[order].cumsum(0)
        total = int(elements[-1])
        k = min(total, int(total * START_SPARSITY) + 1)
        tau0 = float(ordered[torch.searchsorted(elements, k)])
        if tau0 >= 0:
            log.warning("no score is below 0 at the first warm-up step (τ₀ = %g): start the warm-up later", tau0)
        return tau0

    def _set_masks(self, alive: Tensor) -> None:
        if self.config.score == "shared":
            self._set_kept(Kept({g.block: g.of(alive).nonzero().flatten().tolist() for g in self._groups}))
            return
        self._masks = {}
        for group in self._groups:
            mask, name = group.spread(group.of(alive)), group.parameter
            self._masks[name] = self._masks[name] & mask if name in self._masks else mask

    # -- resolution

    def resolve(self) -> Kept:
        return super().resolve() if self.config.regularization is None else self._survivors()

    def importance(self) -> Importance:
        """Parameters of a unit times σ of its score, so that under a budget the score alone decides."""
        return {
            block.name: as_numpy(torch.sigmoid(self._unit_scores(block).double())) * block.unit_params
            for block in self.structure.prunable()
        }

    @torch.no_grad()
    def _unit_scores(self, block: Block) -> Tensor:
        """Score of each unit: its own, or the mean over its weights; [units]."""
        groups = {group.parameter: group for group in self._groups if group.block == block.name}
        if self.config.score == "shared":
            return groups[block.sinks[0].parameter].of(self.scores)
        total = torch.zeros(block.units, device=self.scores.device)
        count = 0
        for axis in block.of_role("source", "sink"):
            group = groups[axis.parameter]
            scores = group.spread(group.of(self.scores)).expand(self.masked.dense[axis.parameter].shape)
            mine = by_unit(axis, scores)
            total += mine.sum(1)
            count += mine.shape[1]
        return total / count

    def _survivors(self) -> Kept:
        """Units with any living part, plus the best others up to the floors and the next allowed number."""
        kept = Kept()
        for block in self.structure.prunable():
            alive = self._living(block)
            wanted = self.budget.round_up(block, int(alive.sum()))
            first = alive.double() * 2.0 + torch.sigmoid(self._unit_scores(block).double()).to(alive.device)
            best = torch.sort(first, descending=True, stable=True).indices[:wanted]
            kept.units[block.name] = sorted(best.tolist())
        return kept

    def _living(self, block: Block) -> Tensor:
        """Pool every mask per unit, then OR over the parameters; bool [units]."""
        if self.config.score == "shared":
            alive = torch.zeros(block.units, dtype=torch.bool)
            alive[self._kept.of(block)] = True
            return alive
        alive = torch.zeros(block.units, dtype=torch.bool, device=self.scores.device)
        scored = {group.parameter for group in self._groups if group.block == block.name}
        for axis in block.axes:
            if axis.parameter in scored:
                mask = self._masks.get(axis.parameter)
                if mask is None:
                    return torch.ones_like(alive)
                alive |= by_unit(axis, mask.expand(self.masked.dense[axis.parameter].shape)).any(1)
        return alive

    # -- log and resume

    def sparsity(self) -> float:
        if self.resolved or self.config.score == "shared":
            return super().sparsity()
        cut = sum(
            int((~mask).sum()) * (self.masked.dense[name].numel() // mask.numel()) for name, mask in self._masks.items()
        )
        return cut / sum(costs.params(block, block.units) for block in self.structure)

    def logs(self) -> dict[str, float]:
        found = super().logs() | {"compress/score_mean": float(self.scores.detach().mean())}
        if self.config.regularization is not None:
            found["compress/regularization"] = float(self._regularization)
            threshold = self.at(self._step)["threshold"]
            if math.isfinite(threshold):
                found["compress/threshold"] = threshold
        return found

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"scores": self.scores.detach().cpu().clone()}
        if self.config.score == "block":
            state |= {f"mask.{name}": mask.cpu().clone() for name, mask in self._masks.items()}
        if self._tau0 is not None:
            state["tau0"] = torch.tensor(self._tau0, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._tau0 = float(state["tau0"]) if "tau0" in state else None
        with torch.no_grad():
            self.scores.copy_(state["scores"])
        super().load_state_dict(state)
        if self.config.score == "block":
            device = self.scores.device
            self._masks = {n.removeprefix("mask."): m.to(device) for n, m in state.items() if n.startswith("mask.")}
            self.masked.apply(self._masks)
