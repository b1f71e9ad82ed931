"""What a recipe would do: stages, steps, and predicted parameters, multiply-adds, size and time.

Nothing is trained and nothing is downloaded. The model is built without weights, from its
config when that is on this machine, else from the default config of `planning.model_type`;
rows are counted when the data is here, else `planning.train_rows` is assumed. Seconds come
from the multiply-adds and a short matrix product on this machine: expect them within a
factor of two.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Structure
from mptrain.compress.structure.find import find_structure
from mptrain.compress.weights import palettize
from mptrain.compress.weights.times import predicted_seconds
from mptrain.core.errors import ModelError
from mptrain.core.signature import Batch
from mptrain.data.load import Task
from mptrain.data.tasks.labels import class_lines
from mptrain.flow import preflight
from mptrain.models.samples import made_up
from mptrain.recipe import Recipe, Stage, WeightOnly
from mptrain.recipe.plan import phases, variants

Tables = Mapping[str, palettize.Table]


@dataclass(frozen=True)
class Outlook:
    """Sizes of the dense model: parameters of its blocks, of its embeddings, of all else, and MACs of the blocks."""

    encoder: int
    embeddings: int
    other: int
    macs: int


def dry_run(recipe: Recipe, *, allow_code: bool = False) -> str:
    """The plan as text for a terminal. Raises UserError for inputs that are here but unusable."""
    inputs = preflight.check(recipe, allow_code=allow_code, offline=True)
    data, model, said = inputs.data, inputs.architecture.model, inputs.architecture.said
    if model is None:
        raise ModelError(
            f"model.path: the class of {recipe.model.path} cannot be built on torch's meta device, without weights, so"
            " that a dry run can predict nothing; run the recipe itself."
        )
    rows, rows_from = (len(data.train), "counted") if data is not None else (_assumed_rows(recipe), "assumed")
    structure = _structure(recipe, model)
    outlook = _outlook(model, structure, recipe.data.max_length, _example(recipe, model, data))
    speed = _macs_per_second()
    text = io.StringIO()
    console = Console(width=110, file=text)
    console.print(f"{recipe.name}: {recipe.description}")
    console.print(f"model: {recipe.model.path} ({said}); data: {rows:,} training rows ({rows_from})")
    console.print(f"output: {recipe.output.dir}\n")
    if data is not None and "labels" in data.facts:
        console.print("\n".join([*class_lines(data.facts["labels"]), ""]), markup=False, highlight=False)
    console.print(_stages(recipe, rows, outlook, speed, _compressing(recipe, model, data, speed)))
    tables = {stage.id: palettize.tables(model, stage.palettize) for stage in recipe.stages if stage.palettize}
    console.print(_variants(recipe, tables, outlook))
    for line in _caches(recipe, structure):
        console.print(line)
    if tables:
        console.print(_tables(recipe, tables))
    console.print("Predicted from sizes and a short measurement here; times within about a factor of two.")
    return text.getvalue()


def _compressing(recipe: Recipe, model: PreTrainedModel, data: Task | None, speed: float) -> dict[str, float]:
    """Seconds of weight-only quantization, by stage."""
    length = float(recipe.data.max_length)
    count = recipe.data.calibration.samples
    if data is not None:
        length, count = statistics.fmean(data.train.lengths), min(count, len(data.train))
    tokens = round(length * count)
    return {
        stage.id: predicted_seconds(model, stage.quantize, tokens, speed)
        for stage in recipe.stages
        if isinstance(stage.quantize, WeightOnly)
    }


def _stages(recipe: Recipe, rows: int, outlook: Outlook, speed: float, compressing: Mapping[str, float]) -> Table:
    table = Table(title="Phases", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "phase", "steps", "does", "time"):
        table.add_column(name, justify="right" if name in ("steps", "time") else "left")
    total = 0.0
    for stage in recipe.stages:
        for phase in phases(stage, rows):
            seconds = _seconds(stage, "prune" in phase.methods, phase.steps, outlook, speed)
            if stage.id in compressing and not phase.steps:
                seconds = compressing[stage.id]
            total += seconds
            does = _does(recipe.precision.compute, stage, phase)
            table.add_row(stage.id, phase.name, f"{phase.start}–{phase.end}", does, _minutes(seconds))
    table.add_row("", "", "", "all phases", _minutes(total))
    return table


def _does(compute: str, stage: Stage, phase: Any) -> str:
    parts = ["train" if compute == "fp32" else f"train in {compute}"] if phase.steps else []
    parts += [method.words() for method in stage.methods if method.field in phase.methods]
    if stage.distill and phase.steps:
        parts.append(stage.distill.words(stage.teacher))
    return " + ".join(parts)


def _variants(recipe: Recipe, tables: Mapping[str, Tables], outlook: Outlook) -> Table:
    table = Table(title="\nVariants", title_justify="left", box=None, pad_edge=False)
    for name in ("variant", "parameters", "MACs", "size", "against fp32"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    dense = _bytes(outlook, 1.0, 4.0, 4.0)
    for planned in variants(recipe):
        stage = recipe.stage(planned.stage)
        kept = _kept(recipe, stage)
        if kept is None:
            table.add_row(planned.id, "by regularization", "", "", "")
            continue
        weight, embedding = planned.export.bytes_per_weight(stage, planned.precision)
        if stage.palettize and not planned.export.expands(stage):
            size = _palettized_bytes(tables[stage.id], stage, outlook, kept, weight)
        else:
            size = _bytes(outlook, kept, weight, embedding)
        params = outlook.encoder * kept + outlook.embeddings + outlook.other
        table.add_row(
            planned.id, f"{params / 1e6:.1f} M", f"{outlook.macs * kept / 1e9:.2f} G", f"{size / 1e6:.1f} MB",
            f"{dense / size:.2f}×",
        )  # fmt: skip
    return table


def _structure(recipe: Recipe, model: PreTrainedModel) -> Structure | None:
    """None for a model of no known family, which only pruning needs."""
    try:
        return find_structure(model)
    except ModelError:
        if any(stage.prune for stage in recipe.stages):
            raise
        return None


def _caches(recipe: Recipe, structure: Structure | None) -> list[str]:
    lines = []
    for export in recipe.export:
        if structure is None or export.cache is None or export.caches is None:
            continue
        size = {"float16": 2, "float32": 4}[export.caches]
        heads = structure.of_kind("heads")  # a unit is a key and a value head
        values = sum(2 * block.units * costs.head_dim(block) for block in heads)
        lines.append(
            f"{export.id}: keeps a key-value cache of {export.cache:,} tokens, {export.caches} states of"
            f" {values * export.cache * size / 1e6:.3g} MB before any pruning"
        )
    return lines


def _tables(recipe: Recipe, tables: Mapping[str, Tables]) -> Table:
    """What palettized weights take where a target stores tables, before any pruning."""
    table = Table(title="\nPalettized weights", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "bits", "layers", "weights", "size", "against fp16"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in recipe.stages:
        if stage.palettize is None:
            continue
        budget = stage.palettize.size_budget
        alike: dict[str, list[palettize.Table]] = {}
        for found in tables[stage.id].values():
            bits = f"{found.bits / found.cluster_dim:g}" if budget is None else "by sensitivity"
            alike.setdefault(bits, []).append(found)
        for bits, group in sorted(alike.items()):
            count = sum(t.rows * t.columns for t in group)
            size = sum(t.stored_bytes for t in group) if budget is None else budget * count / 8
            table.add_row(
                stage.id, bits, str(len(group)), f"{count / 1e6:.1f} M", f"{size / 1e6:.1f} MB",
                f"{2 * count / size:.2f}×",
            )  # fmt: skip
    return table


def _kept(recipe: Recipe, stage: Stage) -> float | None:
    """Fraction of the blocks that a stage keeps, over the stages it starts from; None when only training tells."""
    kept = 1.0
    if stage.prune is not None:
        keep = stage.prune.keep
        if keep is None:
            return None
        kept = keep.encoder_params or keep.macs or keep.latency or ((keep.heads or 1.0) + 2 * (keep.ffn or 1.0)) / 3
    start = recipe.start_of(stage)
    before = 1.0 if start == "model" else _kept(recipe, recipe.stage(start))
    return None if before is None else kept * before


def _bytes(outlook: Outlook, kept: float, weight: float, embedding: float) -> float:
    return (outlook.encoder * kept + outlook.other) * weight + outlook.embeddings * embedding


def _palettized_bytes(tables: Tables, stage: Stage, outlook: Outlook, kept: float, weight: float) -> float:
    """Where a target stores tables; pruning is taken to shrink all blocks alike."""
    assert stage.palettize is not None
    budget = stage.palettize.size_budget
    count = sum(t.rows * t.columns for t in tables.values())
    size = sum(t.stored_bytes for t in tables.values()) if budget is None else budget * count / 8
    dense = outlook.encoder + outlook.embeddings + outlook.other
    return (size + (dense - count) * weight) * (outlook.encoder * kept + dense - outlook.encoder) / dense


def _seconds(stage: Stage, warmup: bool, steps: int, outlook: Outlook, speed: float) -> float:
    """Forward and backward are three forwards; a teacher one more; fake quantizers cost about half a step."""
    if stage.train is None or not steps:
        return 30.0 if stage.quantize or stage.prune or stage.palettize else 0.0
    kept = 1.0
    if stage.prune is not None and not warmup and stage.prune.keep is not None:
        kept = stage.prune.keep.encoder_params or stage.prune.keep.macs or 0.5
    passes = 3.0 * kept * (1.5 if stage.quantize else 1.0) + (1.0 if stage.distill else 0.0)
    padding = 0.35 if stage.train.group_by_length else 1.0  # texts are shorter than the limit
    rows = stage.train.batch_size * stage.train.accumulation
    return steps * rows * outlook.macs * passes * padding / speed


def _example(recipe: Recipe, model: PreTrainedModel, data: Task | None) -> Batch | None:
    """The sizes of one picture or sound, without values; None for texts, whose length says it all."""
    if recipe.model.kind.unit == "tokens":
        return None
    length = recipe.data.max_length
    found = data.example(1, length) if data else made_up(model, recipe.model.kind, 1, length).batches[0]
    # a mask changes no size, and cannot be looked at without values
    return {name: value.to("meta") for name, value in found.items() if value.is_floating_point()}


def _outlook(model: torch.nn.Module, structure: Structure | None, length: int, example: Batch | None = None) -> Outlook:
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    total = sum(p.numel() for p in model.parameters())
    if structure is None:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if example is not None:
                model.eval()(**example)
        # of a text a multiply-add to a weight and token
        macs = (total - embeddings) * length if example is None else counter.get_total_flops() // 2
        return Outlook(0, embeddings, total - embeddings, macs)
    rows = costs.layer_costs(structure, length if example is None else costs.measure_extents(model, structure, example))
    encoder = sum(r["params"] for r in rows)
    return Outlook(encoder, embeddings, total - encoder - embeddings, sum(r["macs"] for r in rows))


def _assumed_rows(recipe: Recipe) -> int:
    return min(recipe.planning.train_rows, recipe.data.max_samples or recipe.planning.train_rows)


def _macs_per_second() -> float:
    """Multiply-adds a second of a float32 matrix product of a transformer's shape, all threads."""
    a, b = torch.randn(1024, 768), torch.randn(768, 768)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - begun)
    # element-wise work and the optimizer take about half of a training step
    return 0.5 * a.shape[0] * b.numel() / statistics.median(times)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
