"""Weight-only quantization and palettization as methods of a stage: both leave records on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, cast

from torch import nn

from mptrain.compress import base
from mptrain.compress.base import Config, Method, Site, Sizes, Tables, Tools, TrainingMethod
from mptrain.compress.structure.scopes import resolve
from mptrain.compress.weights import palettize, records, weight_only
from mptrain.compress.weights.coverage import coverage
from mptrain.compress.weights.grid import AUTO
from mptrain.compress.weights.layers import CONVOLUTIONS, LINEAR
from mptrain.compress.weights.records import BlockQuantized, Palettized
from mptrain.compress.weights.rounded_training import RoundedTrainer
from mptrain.compress.weights.table_training import TableTrainer
from mptrain.compress.weights.times import predicted_seconds
from mptrain.recipe.tables import Palettize
from mptrain.recipe.weights import WeightOnly


class _Recording(Method[Config], Generic[Config]):
    order = base.RECORDS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._rows: list[dict[str, Any]] = []
        self._coverage: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        return {"compressed": self._rows, "coverage": self._coverage}

    def _describe(self, model: nn.Module) -> None:
        found = records.of(model)
        self._rows = records.describe(found)
        self._coverage = coverage(model, found).facts()


class WeightOnlyQuantization(_Recording[WeightOnly]):
    _trainer: RoundedTrainer | None = None

    @classmethod
    def check(cls, config: WeightOnly, skeleton: nn.Module, site: Site) -> None:
        names = [name for name, _ in skeleton.named_modules()]
        resolve(config.ignore, names, "quantize.ignore")
        resolve(list(config.overrides), names, "quantize.overrides")
        if site.exact:
            weight_only.choices(skeleton, config)

    @classmethod
    def outlook(cls, config: WeightOnly, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        zero = 0.0 if config.symmetric else config.bits / 8
        block = max(AUTO) if config.block_size == "auto" else config.block_size
        weight = config.bits / 8 + ((2 + zero) / block if config.granularity == "block" else 0.0)
        weight = weight if config.size_budget is None else config.size_budget / 8
        stored = {"fp32": 4.0, "int8": 1.0, "same": weight}
        share = _share_of_convolutions(skeleton)
        layer = (1 - share) * weight + share * stored[config.convolutions]
        return replace(sizes, layer_bytes=layer, embedding_bytes=stored[config.embeddings])

    @classmethod
    def seconds(cls, config: WeightOnly, skeleton: nn.Module, tokens: int, macs_per_second: float) -> float:
        return predicted_seconds(skeleton, config, tokens, macs_per_second)

    def still(self, model: nn.Module) -> list[nn.Parameter]:
        """Embeddings that are rounded, tied heads with them, while layers train through their rounding."""
        return [] if self.config.finetune is None else [model.get_parameter(name) for name in self._tables(model)]

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        if self.config.finetune is not None and tools.steps:
            names = weight_only.choices(model, self.config)
            dense = {name: model.get_parameter(name).detach().clone() for name in names}
            self._compress(model, tools)
            found = records.distinct(records.of(model))
            records.forget(model)
            self._stored = {name: found.pop(name) for name in self._tables(model)}
            integers = cast(dict[str, BlockQuantized], found)  # no table is left where this method rounds
            self._trainer = RoundedTrainer(integers, dense, self.config.finetune)
            self._trainer.prepare(model)
        return model

    def training(self) -> TrainingMethod | None:
        return self._trainer

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        if self._trainer is None:
            self._compress(model, tools)
        else:
            records.attach(model, {**self._trainer.records(), **self._stored})
        self._describe(model)
        return model.to("cpu")

    def _compress(self, model: nn.Module, tools: Tools) -> None:
        needs = self.config.needs()
        weight_only.compress(
            model.to(tools.device),
            self.config,
            tools.inputs() if "inputs" in needs else (),
            tools.labelled() if "labels" in needs else (),
            tools.ranks,
            tools.loss,
        )

    def _tables(self, model: nn.Module) -> list[str]:
        """The names of weights that it rounds and that an embedding looks up."""
        looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        return [n for n in weight_only.choices(model, self.config) if id(model.get_parameter(n)) in looked_up]


def _share_of_convolutions(skeleton: nn.Module) -> float:
    """Of the weights of its layers."""
    counts = {
        kinds: sum(module.weight.numel() for module in skeleton.modules() if isinstance(module, kinds))
        for kinds in (LINEAR, CONVOLUTIONS)
    }
    return counts[CONVOLUTIONS] / max(1, sum(counts.values()))


class Palettization(_Recording[Palettize]):
    """Tables at the end of a stage, or with `finetune` at its beginning, and then they train."""

    @classmethod
    def check(cls, config: Palettize, skeleton: nn.Module, site: Site) -> None:
        names = [name for name, _ in skeleton.named_modules()]
        resolve(config.ignore, names, "palettize.ignore")
        resolve(list(config.overrides), names, "palettize.overrides")
        if site.exact:
            palettize.tables(skeleton, config)

    @classmethod
    def outlook(cls, config: Palettize, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        budget = config.size_budget
        alike: dict[str, list[palettize.Table]] = {}
        for table in palettize.tables(skeleton, config).values():
            bits = f"{table.bits / table.cluster_dim:g}" if budget is None else "by sensitivity"
            alike.setdefault(bits, []).append(table)
        found = []
        for bits, tables in sorted(alike.items()):
            count = sum(t.rows * t.columns for t in tables)
            size = sum(t.stored_bytes for t in tables) if budget is None else budget * count / 8
            found.append(Tables(bits, len(tables), count, size))
        return replace(sizes, tables=tuple(found))

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        self._trainer: TableTrainer | None = None
        if self.config.finetune is not None and tools.steps:
            self._trainer = TableTrainer(self._palettized(model, tools), self.config.finetune, lr=tools.lr)
            self._trainer.prepare(model)
        return model

    def training(self) -> TrainingMethod | None:
        return self._trainer

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        found = self._palettized(model, tools) if self._trainer is None else self._trainer.records()
        records.attach(model, found)
        self._describe(model)
        return model.to("cpu")

    def _palettized(self, model: nn.Module, tools: Tools) -> dict[str, Palettized]:
        """Records of the weights; what a stage before made of them is forgotten."""
        records.forget(model)
        return palettize.palettize(
            model.to(tools.device),
            self.config,
            tools.labelled() if "labels" in self.config.needs() else None,
            loss_fn=tools.loss,
            seed=tools.seed,
            widths=[bits for bits in palettize.WIDTHS if tools.widths is None or bits in tools.widths],
            ranks=tools.ranks,
        )
