"""Structured pruning as a method of a stage: masks while the warm-up trains, cut at the boundary.

The subclasses say which pruner the settings of a recipe belong to; what a pruner does is in its own file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from mptrain.compress import base, boundary
from mptrain.compress.base import Batch, Method, Site, Sizes, Tools, TrainingMethod
from mptrain.compress.prune import measured
from mptrain.compress.prune.base import Pruner, Warmup
from mptrain.compress.prune.curvature import CurvaturePruner, check_readers
from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.prune.magnitude import MagnitudePruner
from mptrain.compress.prune.movement import MovementPruner
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Structure
from mptrain.compress.structure.budget import Budget, Widths
from mptrain.compress.structure.find import droppable, find_structure
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.recipe.prune import Keep, PruneConfig

log = logging.getLogger(__name__)

DROP_QUANTIZED = (
    "prune.drop: a model that carries quantizers cannot lose whole blocks, for these are counted by its operations:"
    " prune first and quantize in a later stage (or with quantize.start: after_prune)"
)


class Pruning(Method[PruneConfig]):
    order = base.PRUNE
    kind: ClassVar[type[Pruner]]
    _held: dict[str, Any] | None = None
    _start = 1.0

    @classmethod
    def check(cls, config: PruneConfig, skeleton: nn.Module, site: Site) -> None:
        structure = find_structure(skeleton, site.example, ignore=config.ignore)
        drop = cls.droppable(config, skeleton, structure, site.example)
        keep = config.budget()
        in_time = keep is not None and (keep.of_export() or ("",))[0] == "latency"
        for block in structure if in_time else ():
            costs.kind(block)
        # a budget in milliseconds is measured, one in multiply-adds of images and sounds needs their sizes
        if keep is None or in_time or (keep.macs is not None and site.length is None):
            return
        if keep.against is not None or (keep.size is not None and site.bytes is None):
            return
        whole = None if site.bytes is None else measured.from_bytes(skeleton, structure, site.bytes)
        if site.exact:
            floors = {name: getattr(config, name) for name in ("min_heads", "min_ffn", "round_ffn")}
            Budget(structure, keep, length=site.length or 1, whole=whole, drop=drop, **floors)

    @classmethod
    def droppable(
        cls, config: PruneConfig, model: nn.Module, structure: Structure, example: Batch | None
    ) -> frozenset[str]:
        """Names of the blocks that may be left out whole."""
        return frozenset()

    @classmethod
    def check_steps(cls, config: PruneConfig, steps: int, steps_per_epoch: int) -> None:
        Warmup.of(config.schedule, phase_steps=steps, steps_per_epoch=steps_per_epoch)

    @classmethod
    def outlook(cls, config: PruneConfig, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        return sizes.kept(_fraction(config.budget(), sizes))

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        model.to(tools.device)
        config, keep = self.config, self.config.budget()
        example = {name: value.to(tools.device) for name, value in tools.example().items()}
        structure = find_structure(model, example, ignore=config.ignore)
        extents: costs.Length = tools.length
        if keep is not None and (keep.macs or keep.latency or keep.speedup):
            extents = costs.measure_extents(model, structure, example)
        self._asked = None if keep is None else keep.of_export()
        given = config if self._asked is None else config.model_copy(update={"keep": self._of_start(model, tools)})
        whole = None if self._asked is None else self._whole(model, structure, extents, tools)
        with self._counting_from_start():
            self.pruner = self.kind(
                given,  # type: ignore[arg-type]  # each pruner takes the settings of its own kind
                structure=structure,
                phase_steps=tools.steps,
                steps_per_epoch=tools.steps_per_epoch,
                lr=tools.lr,
                length=extents,
                whole=whole,
                drop=self.droppable(config, model, structure, example),
            )
        self.pruner.prepare(model)
        self.collect(model, tools)
        self._steps = tools.steps
        return model

    def collect(self, model: nn.Module, tools: Tools) -> None:
        """A calibration pass, for methods that need one to prune at once."""

    def refit(self, tools: Tools) -> list[Batch] | None:
        """Inputs on which what stays is refitted to the outputs of the dense layers; None: it is not."""
        return None

    def training(self) -> TrainingMethod | None:
        return self.pruner if self._steps else None

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        if self._asked is not None:
            self._held = measured.hold(self.pruner, model, tools, self._asked[0], self._start)
        self._structure = costs.describe(self.pruner.structure, self.pruner.kept())
        return boundary.cut(model, self.pruner, self.refit(tools))

    def facts(self) -> dict[str, Any]:
        return {"structure": self._structure} | ({} if self._held is None else {"budget": self._held})

    @contextmanager
    def _counting_from_start(self) -> Iterator[None]:
        """Errors about a share say what it is a share of."""
        try:
            yield
        except UserError as error:
            if self._start == 1.0:
                raise
            raise type(error)(
                f"{error} These are shares of the model that the stage starts from, which costs {self._start:.3g} of"
                " the one that it counts against."
            ) from None

    def _of_start(self, model: nn.Module, tools: Tools) -> Keep:
        """The budget in parts of what the model costs that the phase begins with; all of it, where that is less."""
        assert self._asked is not None
        name, share = self._asked
        self._start = float(tools.once("start", lambda: measured.beside(model, tools, name)))
        return Keep.model_validate({name: min(1.0, share / self._start)})

    def _whole(self, model: nn.Module, structure: Structure, extents: costs.Length, tools: Tools) -> costs.Whole:
        """What the model costs that the phase begins with, in parts of it."""
        assert self._asked is not None
        name, config = self._asked[0], self.config

        def make() -> dict[str, Any]:
            counted = model if tools.whole is None else tools.whole()
            whole, lengths = structure, extents
            if counted is not model:
                whole = find_structure(counted, tools.example(), ignore=config.ignore)
                if not isinstance(extents, int):
                    lengths = costs.measure_extents(counted, whole, tools.example())
            widths = Widths(config.min_heads, config.min_ffn, config.round_ffn)
            found = measured.measure(
                counted, whole, tools.example(), tools.runtime(), budget=name, extents=lengths, widths=widths
            )
            return measured.as_json(found)

        def seen() -> dict[str, Any]:
            settings = json.dumps([config.min_heads, config.min_ffn, config.round_ffn, config.ignore])
            depends = f"{tools.counted} {tools.runtime().words} {settings}"
            found = tools.shared(f"{name}-{hashlib.sha256(depends.encode()).hexdigest()[:16]}", make)
            return measured.as_json(costs.Whole(**found).seen_from(structure, self._start))

        return costs.Whole(**tools.once(name, seen))


class MovementPruning(Pruning):
    kind = MovementPruner


class FisherPruning(Pruning):
    kind = FisherPruner

    def collect(self, model: nn.Module, tools: Tools) -> None:
        if "labels" in self.config.needs():
            self.pruner.collect(model, tools.labelled(), tools.loss)

    def refit(self, tools: Tools) -> list[Batch] | None:
        return tools.inputs() if "inputs" in self.config.needs() else None


class CurvaturePruning(Pruning):
    kind = CurvaturePruner
    pruner: CurvaturePruner

    @classmethod
    def check(cls, config: PruneConfig, skeleton: nn.Module, site: Site) -> None:
        super().check(config, skeleton, site)
        structure = find_structure(skeleton, site.example, ignore=config.ignore)
        check_readers(skeleton, structure, f"{site.field}.ignore")
        if config.drop and site.quantized:  # type: ignore[attr-defined]
            raise UserError(DROP_QUANTIZED)

    @classmethod
    def droppable(
        cls, config: PruneConfig, model: nn.Module, structure: Structure, example: Batch | None
    ) -> frozenset[str]:
        """Warns of blocks that keep their floors. Raises UserError where that is all of them, and for a model that
        carries quantizers."""
        if not config.drop:  # type: ignore[attr-defined]
            return frozenset()
        if is_quantized(model):
            raise UserError(DROP_QUANTIZED)
        names, refused = droppable(model, structure, example)
        said = "; ".join(f"{one.what}: {one.reason}" for one in refused[:5]) + (" …" if len(refused) > 5 else "")
        if not names:
            raise UserError(f"prune.drop: no block can be left out whole, so take it out ({said})")
        if refused:
            log.warning("prune.drop: %d blocks keep at least their floors (%s)", len(refused), said)
        return frozenset(names)

    def collect(self, model: nn.Module, tools: Tools) -> None:
        self.pruner.look(model, tools.inputs(), seed=tools.seed, ranks=tools.ranks)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"curvature": self.pruner.facts()}


class MagnitudePruning(Pruning):
    kind = MagnitudePruner


def _fraction(keep: Keep | None, sizes: Sizes) -> float | None:
    """Of the blocks that stays, roughly: an FFN is about two thirds of a layer. None: only training tells."""
    if keep is None:
        return None
    if keep.size is not None:
        return max(0.0, 1.0 - (1.0 - keep.size) * sizes.params / sizes.layers)
    return (
        keep.encoder_params
        or keep.macs
        or (keep.of_export() or ("", 0.0))[1]
        or ((keep.heads or 1.0) + 2 * (keep.ffn or 1.0)) / 3
    )
