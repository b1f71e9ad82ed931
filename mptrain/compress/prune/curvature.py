"""Curvature pruning: units leave one by one at the least loss, and what stays answers for what left.

For a projection W that reads the units of a block (attention output, fc_out), the loss of a change is

    ½ tr(G ΔW H ΔWᵀ)

with H the covariance of its inputs and G the Gram of the gradients at its outputs (calibrate/curvature.py). Units go
greedily by that loss *with* the best update of the weights that stay (removal.py), so a channel that others can stand
in for is cheap even when it is large; the Fisher search (fisher.py) prices it as if nothing could. Losses are
absolute: a knapsack (structure/budget.py) spreads any budget over the blocks, and the loss without a block is one size
more (`drop`). At the boundary the weights that stay are those of the ridge regression at the chosen size, and the bias
takes up the mean of what left.

At once, without labels. The method for one projection is that of optimal brain surgeon (Hassibi and Stork 1993), for
whole units that of ZipLM (Kurtic et al. 2023, arXiv 2302.04089), which weighs all outputs alike (G = I); the Kronecker
factor G is that of The LLM Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.calibrate.curvature import Probe, curvatures, logits
from mptrain.compress.calibrate.ranks import ALONE, Ranks
from mptrain.compress.prune.base import Pruner
from mptrain.compress.prune.removal import Reader, Removal, refit, removal
from mptrain.compress.structure.blocks import Block, Kept, Structure
from mptrain.compress.structure.consumers import Consumer, consumers
from mptrain.compress.structure.dropped import add_bias
from mptrain.core.errors import ModelError
from mptrain.core.progress import track
from mptrain.core.signature import Batch

log = logging.getLogger(__name__)


def readers(model: nn.Module, block: Block) -> list[Consumer]:
    """The Linears that read a block's units and nothing else; none where something else reads them too."""
    found = consumers(model, block)
    whole = all(consumer.columns.numel() == consumer.axis.size for consumer in found)
    return found if whole and len({c.module for c in found}) == len(block.sinks) else []


def check_readers(model: nn.Module, structure: Structure, field: str) -> None:
    """Raises ModelError for blocks that curvature cannot prune: something else than Linears reads their units."""
    others = [block for block in structure.prunable() if not readers(model, block)]
    if others:
        listed = ", ".join(f"{block.name} ({_read_by(model, block)})" for block in others[:5])
        listed += " …" if len(others) > 5 else ""
        raise ModelError(
            "curvature prunes blocks whose units are the inputs of Linears that read nothing else, and these are not:"
            f" {listed}. Leave them alone with {field}, or use method fisher."
        )


def _read_by(model: nn.Module, block: Block) -> str:
    """The first module that reads its units, and what it is."""
    name = block.sinks[0].parameter.rpartition(".")[0]
    return f"read by {name}, {type(model.get_submodule(name)).__name__}"


class CurvaturePruner(Pruner):
    name = "curvature"

    def look(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        probe: Probe = logits,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Collect the curvature on calibration batches and order all units; needed before `kept` and `refit`.

        batches: keyword arguments of the model; labels are left out. The model is left as it was. Raises UserError
        without batches, ModelError for values that are not finite.
        """
        check_readers(model, self.structure, "prune.ignore")
        blocks = {block.name: (block, readers(model, block)) for block in self.structure.prunable()}
        modules = {c.module: (name, c) for name, (_, found) in blocks.items() for c in found}
        self._removals: dict[str, Removal] = {}
        self._moments: dict[str, list[tuple[Consumer, Tensor, Tensor]]] = {name: [] for name in blocks}
        waiting: dict[str, list[Reader]] = {name: [] for name in blocks}
        thin: list[str] = []
        for group in curvatures(model, list(modules), batches, probe=probe, seed=seed, ranks=ranks):
            for module, found in track(list(group.items()), "ordering units"):
                name, consumer = modules[module]
                block, all_readers = blocks[name]
                covariance, mean = found.covariance()
                columns = consumer.columns.flatten().to(covariance.device)
                matrix = consumer.matrix(model).detach()[:, columns]
                waiting[name].append(Reader(matrix, covariance[columns][:, columns], found.gram()))
                self._moments[name].append((consumer, covariance, mean))
                self.tokens = int(found.tokens)
                if found.tokens < len(covariance):
                    thin.append(module)
                if len(waiting[name]) == len(all_readers):
                    self._removals[name] = removal(waiting.pop(name), block.units, damping=self._damping)
        if thin:
            log.warning(
                "curvature: %d calibration tokens are fewer than the inputs of %d layers (%s …), so damping decides"
                " much of their order; raise data.calibration.samples",
                self.tokens,
                len(thin),
                thin[0],
            )

    def resolve(self) -> Kept:
        if not getattr(self, "_removals", None):
            raise RuntimeError("curvature pruning needs look() on calibration batches first")
        counts = self.budget.counts(lambda block: self._removals[block.name].value())
        return Kept({name: self._removals[name].kept(count) for name, count in counts.items()})

    @torch.no_grad()
    def refit(self, model: nn.Module, kept: Kept) -> None:
        """The best weights on the units that stay; the bias, where there is one, takes up the mean of the others. That
        of a block of which nothing stays is made, where there was none: it is all that the block then gives."""
        for block in track([b for b in self.structure.prunable() if kept.cuts(b)], "refitting weights"):
            units = kept.of(block)
            for consumer, covariance, mean in self._moments[block.name]:
                columns = consumer.columns[units].flatten().to(covariance.device)
                weight = consumer.matrix(model)
                reader = model.get_submodule(consumer.module)
                bias = add_bias(reader) if kept.drops(block) else getattr(reader, "bias", None)
                second = covariance if bias is not None else covariance + torch.outer(mean, mean)
                new = refit(weight.detach(), second, columns, damping=self._damping)
                if bias is not None:
                    bias += (weight.double() @ mean - new @ mean[columns]).to(bias.dtype)
                weight[:, columns] = new.to(weight.dtype)

    def facts(self) -> dict[str, Any]:
        """tokens: real ones that the curvature was taken on. loss: the predicted rise, summed over the blocks. dropped:
        the blocks of which nothing is left."""
        counts = {b.name: self.kept().count(b) for b in self.structure.prunable()}
        loss = sum(float(r.loss[len(r.order) - counts[name]]) for name, r in self._removals.items())
        return {"tokens": self.tokens, "loss": loss, "dropped": [name for name, count in counts.items() if not count]}

    @property
    def _damping(self) -> float:
        return self.config.damping  # type: ignore[union-attr]
