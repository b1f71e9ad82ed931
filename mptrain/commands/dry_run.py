"""What a recipe would do: stages, steps, and predicted parameters, multiply-adds, size and time.

Nothing is trained and nothing is downloaded. The model is built without weights, from its
config when that is on this machine, else from the default config of `planning.model_type`;
rows are counted when the data is here, else `planning.train_rows` is assumed. The numbers
are those of flow/outlook.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from mptrain.compress.base import Tables
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Structure
from mptrain.core.errors import ModelError
from mptrain.data.load import Task
from mptrain.data.tasks.labels import class_lines
from mptrain.flow import many_processes, preflight
from mptrain.flow.outlook import Outlook
from mptrain.precision import memory
from mptrain.recipe import Recipe, Stage
from mptrain.recipe.plan import Phase, phases, variants
from mptrain.train.launch import Launch, read


def dry_run(recipe: Recipe, *, allow_code: bool = False, launch: str | None = None) -> str:
    """The plan as text for a terminal. launch: a configuration of accelerate launch, as `train.launch.read` takes it.
    Raises UserError for inputs that are here but unusable, and for what cannot run when launched so."""
    launched = Launch() if launch is None else read(launch)
    inputs = preflight.check(recipe, allow_code=allow_code, processes=launched.processes, offline=True)
    data, model, said = inputs.data, inputs.architecture.model, inputs.architecture.said
    if model is None:
        raise ModelError(
            f"model.path: the class of {recipe.model.named} cannot be built on torch's meta device, without weights, so"
            " that a dry run can predict nothing; run the recipe itself."
        )
    assumed = _assumed_rows(recipe)
    counted = f"{assumed:,} training rows (assumed)" if data is None else _counted(data)
    rows = data.rows if data is not None else lambda stage: assumed
    many_processes.check(recipe, launched, rows)
    outlook = Outlook(recipe, model, data)
    text = io.StringIO()
    console = Console(width=110, file=text)
    console.print(f"{recipe.name}: {recipe.description}")
    console.print(f"model: {recipe.model.named} ({said}); data: {counted}")
    if launch is not None:
        console.print(f"launch: {launched.words()}; training takes {_memory(recipe, model, launched)}")
    elif recipe.precision.compute != "fp32":
        console.print(f"precision: {recipe.precision.words()}; training takes {_memory(recipe, model, launched)}")
    console.print(f"output: {recipe.output.dir}\n")
    if data is not None and "labels" in data.facts:
        console.print("\n".join([*class_lines(data.facts["labels"]), ""]), markup=False, highlight=False)
    console.print(_stages(outlook, rows, launched.processes))
    console.print(_variants(outlook))
    for line in _caches(recipe, outlook.structure):
        console.print(line)
    if tables := outlook.tables():
        console.print(_tables(tables))
    console.print("Predicted from sizes and a short measurement here; times within about a factor of two.")
    return text.getvalue()


def _memory(recipe: Recipe, model: nn.Module, launch: Launch) -> str:
    """Of a process, while the model trains as the recipe starts from it."""
    precision = recipe.precision
    chosen = (precision.compute, precision.master, precision.moments)
    name = next((name for name, kind in memory.PRECISIONS.items() if kind == chosen), "fp32")
    if launch.sharding == "fsdp2":
        found = memory.predict_sharded(model, name, launch.processes, precision.keep_fp32)
    else:
        found = memory.predict(model, name, precision.keep_fp32)
    each = " of each" if launch.processes > 1 else f" ({found.per_parameter:.3g} bytes a parameter)"
    return f"{found.total / 1e9:.3g} GB{each}, activations besides"


def _stages(outlook: Outlook, rows: Callable[[Stage], int], processes: int = 1) -> Table:
    table = Table(title="Phases", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "phase", "steps", "does", "time"):
        table.add_column(name, justify="right" if name in ("steps", "time") else "left")
    total = 0.0
    for stage in outlook.recipe.stages:
        for phase in phases(stage, rows(stage), processes):
            seconds = outlook.seconds(stage, phase)
            total += seconds
            does = _does(outlook.recipe.precision.compute, stage, phase)
            table.add_row(stage.id, phase.name, f"{phase.start}–{phase.end}", does, _minutes(seconds))
    table.add_row("", "", "", "all phases", _minutes(total))
    return table


def _does(compute: str, stage: Stage, phase: Phase) -> str:
    parts = ["train" if compute == "fp32" else f"train in {compute}"] if phase.steps else []
    parts += [method.words() for method in stage.methods if method.field in phase.methods]
    if stage.distill and phase.steps:
        parts.append(stage.distill.words(stage.teacher))
    return " + ".join(parts)


def _variants(outlook: Outlook) -> Table:
    table = Table(title="\nVariants", title_justify="left", box=None, pad_edge=False)
    for name in ("variant", "parameters", "MACs", "size", "against fp32"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    dense = 4.0 * outlook.dense.params
    for planned in variants(outlook.recipe):
        sizes = outlook.sizes(planned.stage)
        if not sizes.known:
            table.add_row(planned.id, "by regularization", "", "", "")
            continue
        size = outlook.bytes(planned)
        table.add_row(
            planned.id, f"{sizes.params / 1e6:.1f} M", f"{sizes.macs / 1e9:.2f} G", f"{size / 1e6:.1f} MB",
            f"{dense / size:.2f}×",
        )  # fmt: skip
    return table


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


def _tables(found: Mapping[str, Sequence[Tables]]) -> Table:
    """What weights in tables take where a target stores them so, before any pruning."""
    table = Table(title="\nPalettized weights", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "bits", "layers", "weights", "size", "against fp16"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, rows in found.items():
        for row in rows:
            table.add_row(
                stage, row.bits, str(row.layers), f"{row.weights / 1e6:.1f} M", f"{row.size / 1e6:.1f} MB",
                f"{2 * row.weights / row.size:.2f}×",
            )  # fmt: skip
    return table


def _counted(data: Task) -> str:
    more = "" if data.unlabelled is None else f", {len(data.unlabelled):,} inputs without labels"
    return f"{len(data.train):,} training rows{more} (counted)"


def _assumed_rows(recipe: Recipe) -> int:
    return min(recipe.planning.train_rows, recipe.data.max_samples or recipe.planning.train_rows)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
