"""What a recipe will come to, predicted before it is run: parameters, multiply-adds, bytes, seconds.

    sizes     of the dense model, and of a stage by what each of its methods says it makes of them
    bytes     layers · bytes of a weight + embeddings · bytes of one, or tables and what is beside them
    seconds   a training step is three forward passes (one, and two backward), a teacher's one more

The model has no weights. Times come from multiply-adds and a short matrix product on this machine: expect them within
a factor of two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from mptrain.compress.base import Sizes, Tables
from mptrain.compress.methods import method_class
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Structure
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import ModelError
from mptrain.core.signature import Batch
from mptrain.data.load import Task
from mptrain.models.samples import made_up
from mptrain.recipe import Recipe, Stage
from mptrain.recipe.plan import Phase, Planned


@dataclass(frozen=True)
class Outlook:
    """model: without weights. data: None where it is not here; then inputs have `data.max_length`."""

    recipe: Recipe
    model: PreTrainedModel
    data: Task | None

    @cached_property
    def structure(self) -> Structure | None:
        """None for a model of no known blocks, which only pruning needs."""
        try:
            return find_structure(self.model)
        except ModelError:
            if any(stage.prune is not None for stage in self.recipe.stages):
                raise
            return None

    @cached_property
    def dense(self) -> Sizes:
        """Of the model that the recipe starts from."""
        example, length = self._example(), self.recipe.data.max_length
        embeddings = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Embedding))
        total = sum(p.numel() for p in self.model.parameters())
        if self.structure is None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                if example is not None:
                    self.model.eval()(**example)
            # of a text a multiply-add to a weight and token
            macs = (total - embeddings) * length if example is None else counter.get_total_flops() // 2
            return Sizes(0, embeddings, total - embeddings, macs)
        extents = length if example is None else costs.measure_extents(self.model, self.structure, example)
        rows = costs.layer_costs(self.structure, extents)
        layers = sum(row["params"] for row in rows)
        return Sizes(layers, embeddings, total - layers - embeddings, sum(row["macs"] for row in rows))

    def sizes(self, stage_id: str) -> Sizes:
        """Of the model at the end of a stage. How weights are stored is as this stage leaves them."""
        sizes = self.dense
        for stage in reversed(self.recipe.chain(stage_id)):
            sizes = replace(sizes, layer_bytes=None, embedding_bytes=None, tables=(), step=1.0)
            if stage.prune is not None and (against := stage.prune.against()) is not None:
                whole = self.sizes(against)
                sizes = replace(sizes, layers=whole.layers, macs=whole.macs)
            for method in stage.methods:
                sizes = method_class(method).outlook(method, self.model, sizes)
        return sizes

    def tables(self) -> dict[str, Sequence[Tables]]:
        """Of the stages that have some."""
        found = {stage.id: self.sizes(stage.id).tables for stage in self.recipe.stages}
        return {stage: tables for stage, tables in found.items() if tables}

    def bytes(self, planned: Planned) -> float:
        """Of an exported file; pruning is taken to shrink all blocks alike."""
        sizes = self.sizes(planned.stage)
        layer, embedding = planned.export.bytes_per_weight(
            planned.precision, (sizes.layer_bytes, sizes.embedding_bytes)
        )
        if not sizes.tables or planned.export.expands(self.recipe.stage(planned.stage)):
            return (sizes.layers + sizes.other) * layer + sizes.embeddings * embedding
        count, size = sum(t.weights for t in sizes.tables), sum(t.size for t in sizes.tables)
        dense = self.dense.params
        return (size + (dense - count) * layer) * sizes.params / dense

    def seconds(self, stage: Stage, phase: Phase) -> float:
        """How long a phase takes here."""
        if stage.train is None or not phase.steps:
            methods = [method for method in stage.methods if method.field in phase.methods]
            return sum(
                method_class(method).seconds(method, self.model, self._calibration, self.macs_per_second)
                for method in methods
            )
        after = self.sizes(stage.id)
        masked = any(method.reshapes for method in stage.methods if method.field in phase.methods)
        macs = self.sizes(self.recipe.start_of(stage)).macs if masked else after.macs
        work = 3.0 * macs * after.step + (self.dense.macs if stage.distill else 0.0)
        padding = 0.35 if stage.train.group_by_length else 1.0  # texts are shorter than the limit
        rows = stage.train.batch_size * stage.train.accumulation
        return phase.steps * rows * work * padding / self.macs_per_second

    @cached_property
    def macs_per_second(self) -> float:
        """Multiply-adds a second of a float32 matrix product of a transformer's shape, all threads."""
        a, b = torch.randn(1024, 768), torch.randn(768, 768)
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - begun)
        # element-wise work and the optimizer take about half of a training step
        return 0.5 * a.shape[0] * b.numel() / statistics.median(times)

    @property
    def _calibration(self) -> int:
        """Tokens."""
        length, count = float(self.recipe.data.max_length), self.recipe.data.calibration.samples
        if self.data is not None:
            length, count = statistics.fmean(self.data.train.lengths), min(count, len(self.data.train))
        return round(length * count)

    def _example(self) -> Batch | None:
        """The sizes of one picture or sound, without values; None for texts, whose length says it all."""
        kind, length = self.recipe.model.kind, self.recipe.data.max_length
        if kind.unit == "tokens":
            return None
        found = self.data.example(1, length) if self.data else made_up(self.model, kind, 1, length).batches[0]
        # a mask changes no size, and cannot be looked at without values
        return {name: value.to("meta") for name, value in found.items() if value.is_floating_point()}
