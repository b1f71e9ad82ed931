"""Fisher mask search (Kwon et al. 2022, arXiv 2204.09656).

With a mask variable m_j on every head and FFN channel, the loss around m = 1 is

    L(m) ≈ L(1) + ½ (1 - m)ᵀ F (1 - m),   F = Σ_batches g gᵀ,   g_j = ∂L/∂m_j = Σ_i ∂L/∂W[i,j] · W[i,j]

summed over the columns of the sinks that belong to unit j. The units with the
largest diagonal I_j = Σ g_j² stay, as many as the budget allows (budget.py).

At once: `collect` sees calibration batches, and after the search every layer trades units
one for one while that lowers (1 - m)ᵀ F (1 - m) with the off-diagonals of its own block.
In a warm-up: I is a decaying sum of the training gradients g², the budget closes on a cubic
schedule, and units come back when their gradient says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mptrain.compress.base import Batch, LossFn, model_loss
from mptrain.compress.prune.base import Pruner, as_numpy, sink_sums
from mptrain.compress.structure.blocks import Kept
from mptrain.compress.structure.budget import Importance
from mptrain.core.progress import track

DECAY = 0.99


class FisherPruner(Pruner):
    name = "fisher"

    def prepare(self, model: nn.Module) -> nn.Module:
        super().prepare(model)
        self._sums = {
            block.name: torch.zeros(block.units, device=self.masked.dense[block.sinks[0].parameter].device)
            for block in self.structure.prunable()
        }
        self._rows: dict[str, Tensor] = {}  # [batches, units] of a calibration pass
        return model

    @torch.no_grad()
    def observe(self) -> None:
        for block in self.structure.prunable():
            g = sink_sums(block, self.masked.product)
            if g is not None:
                self._sums[block.name].mul_(DECAY).add_(g.square())

    def collect(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn | None = None) -> None:
        """Mask gradients of calibration batches, without dropout; the model is left as it was.

        loss_fn(model, batch): a scalar; by default the loss of the model from labels in the batch.
        """
        blocks = self.structure.prunable()
        names = list(dict.fromkeys(axis.parameter for block in blocks for axis in block.sinks))
        weights = [self.masked.parameters[name] for name in names]
        frozen = [w for w in weights if not w.requires_grad]
        training = model.training
        rows: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
        model.eval()
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            for batch in track(batches, "gradients of the masks"):
                loss = (loss_fn or model_loss)(model, {k: v.to(weights[0].device) for k, v in batch.items()})
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
                products = {n: g.float() * w.detach().float() for n, g, w in zip(names, gradients, weights)}
                for block in blocks:
                    g = sink_sums(block, products.get)
                    assert g is not None
                    rows[block.name].append(g.cpu())
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
            model.train(training)
        self._rows = {key: torch.stack(found) for key, found in rows.items()}

    def importance(self) -> Importance:
        found = {name: rows.double().square().sum(0) for name, rows in self._rows.items()} or self._sums
        return {name: as_numpy(sums) for name, sums in found.items()}

    def resolve(self) -> Kept:
        if not self.warmup.end and not self._rows:
            raise RuntimeError("Fisher pruning without a warm-up needs collect() on calibration batches first")
        kept = super().resolve()
        for name, rows in self._rows.items():
            kept.units[name] = rearrange(rows, kept.units[name])
        return kept

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state | {f"fisher.{name}": t.detach().cpu().clone() for name, t in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, total in self._sums.items():
            total.copy_(state[f"fisher.{name}"])


def rearrange(rows: Tensor, kept: list[int]) -> list[int]:
    """Trade kept for cut units one for one while that lowers the Fisher loss of the layer.

    rows: mask gradients [batches, units]; the loss of a cut set C is ||Σ_{j in C} g_j||². Each
    kept unit, least important first, is offered for the cut unit it best replaces.
    Returns as many units as `kept`, ascending, with a loss that is not higher.
    """
    g = rows.double()  # [batches, units]
    importance = g.square().sum(0)
    units = g.shape[1]
    cut = torch.ones(units, dtype=torch.bool)
    cut[kept] = False
    if not cut.any():
        return list(kept)
    total = g[:, cut].sum(1)
    for j in sorted(kept, key=lambda j: (float(importance[j]), j)):
        total_with_j = total + g[:, j]
        # loss when j is cut too and i comes back: ||t - g_i||² = ||t||² - 2 t·g_i + ||g_i||²
        change = importance - 2.0 * (total_with_j @ g)
        change[~cut] = torch.inf
        i = int(change.argmin())
        if float((total_with_j - g[:, i]).square().sum()) < float(total.square().sum()):
            total = total_with_j - g[:, i]
            cut[j], cut[i] = True, False
    return (~cut).nonzero().flatten().tolist()
