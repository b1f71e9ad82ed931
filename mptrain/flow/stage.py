"""Running the phases of a stage, and the boundary where a model changes shape.

At a boundary the order is: resolve masks, detach quantizers, shrink, attach the quantizers
again with their ranges sliced (or calibrate anew). Between phases a model goes through its
folder on disk, in a run that was never interrupted as well, so that both do the same.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn

from mptrain.compress.calibrate.ranks import Ranks
from mptrain.compress.prune import rescale
from mptrain.compress.prune.base import Pruner
from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.prune.magnitude import MagnitudePruner
from mptrain.compress.prune.movement import MovementPruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Structure, find_structure
from mptrain.compress.structure.shrink import linear_slices, shrink
from mptrain.compress.weights import palettize, records, weight_only
from mptrain.compress.weights.table_training import TableTrainer
from mptrain.core.disk import read_json, write_json
from mptrain.data.load import Task
from mptrain.models import artifact
from mptrain.models.load import load_model
from mptrain.recipe import Fisher, Magnitude, Movement, Qat, Recipe, Stage, WeightOnly
from mptrain.recipe.plan import Phase
from mptrain.train import phase as training
from mptrain.train.distill import Distiller

log = logging.getLogger(__name__)

DONE = "done.json"
MODEL = "model"

PRUNERS: dict[type, type[Pruner]] = {Movement: MovementPruner, Fisher: FisherPruner, Magnitude: MagnitudePruner}


@dataclass(frozen=True)
class Context:
    """What every phase needs."""

    recipe: Recipe
    data: Task
    processor: Any
    folder: Path
    plan: dict[str, list[Phase]]
    peers: PartialState
    allow_code: bool

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.peers.process_index, self.peers.num_processes)

    def model_folder(self, stage_id: str) -> Path:
        """Where the model at the end of a stage is; "model" is the one that the recipe starts from."""
        if stage_id == "model":
            return self.folder / "stages" / "model" / MODEL
        return self.folder / self.plan[stage_id][-1].folder / MODEL

    def phase_folders(self, stage_id: str) -> list[Path]:
        """Of the stage and of those it starts from."""
        chain = self.recipe.chain(stage_id)
        return [self.folder / phase.folder for stage in chain for phase in reversed(self.plan[stage.id])]


def keep_start(context: Context) -> None:
    """Save the model that the recipe starts from, where it is exported."""
    recipe = context.recipe
    folder = context.model_folder("model")
    if context.peers.is_main_process and recipe.baseline == "model" and not folder.is_dir():
        model = load_model(recipe.model, context.data.labels, seed=recipe.seed, allow_code=context.allow_code)
        artifact.save(model.eval(), folder, context.processor)


def run_phase(context: Context, phase: Phase) -> dict[str, Any]:
    """Run a phase unless it is done.

    Returns {"history": rows, "wall_s": seconds, "structure": …, "compressed": rows}.
    """
    folder = context.folder / phase.folder
    if (folder / DONE).is_file():
        return read_json(folder / DONE)
    begun = time.monotonic()
    stage = context.recipe.stage(phase.stage)
    model = _starting_model(context, stage, phase)
    pruner = _pruner(context, stage, phase, model) if phase.prune else None
    if phase.quantize_at_start and stage.quantize is not None:
        if isinstance(stage.quantize, WeightOnly):
            labelled = context.data.labelled(context.recipe.data.calibration) if stage.quantize.size_budget else ()
            model.to(context.peers.device)
            weight_only.compress(model, stage.quantize, _calibration(context), labelled, context.ranks)
        else:
            model = quantizers.quantize(model, stage.quantize, _calibration(context))
    model.to(context.peers.device)
    tables = _table_trainer(context, stage, phase, model)
    if tables is not None:
        tables.prepare(model)
    history: list[dict[str, Any]] = []
    trained_s = 0.0
    if pruner is not None:
        pruner.prepare(model)
        if phase.steps == 0:
            pruner.collect(model, context.data.labelled(context.recipe.data.calibration))
    begun_training, asked_to_stop = time.monotonic(), False
    if phase.steps and stage.train is not None:
        with _graceful_stop(context.peers) as stop:
            history, trained_s = training.train_phase(
                model,
                phase=phase,
                train=stage.train,
                data=context.data,
                folder=folder,
                seed=context.recipe.seed,
                stop=stop,
                precision=context.recipe.precision,
                compressors=[c for c in (pruner, tables) if c is not None],
                distiller=_distiller(context, stage),
                watch=any("fp16" in export.precision for export in context.recipe.export),
            )
            asked_to_stop = stop()  # in the last step or evaluation, after which no checkpoint stops the training
        # what an earlier, killed attempt trained; the rest is in begun
        trained_s -= time.monotonic() - begun_training
    model.to("cpu")
    structure = None
    if pruner is not None:
        structure = costs.describe(pruner.structure, pruner.kept())
        model = _boundary(context, stage, model, pruner)
    if tables is not None:
        tables.finalize(model)
    elif phase.palettize:
        records.attach(model, _palettized(context, stage, model))
        model.to("cpu")
    if context.peers.is_main_process:
        artifact.save(model.eval(), folder / MODEL, context.processor)
        wall = time.monotonic() - begun + trained_s
        compressed = records.describe(records.of(model))
        facts = {"history": history, "wall_s": round(wall, 3), "structure": structure, "compressed": compressed}
        write_json(folder / DONE, facts)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        (folder / "best.safetensors").unlink(missing_ok=True)
    context.peers.wait_for_everyone()
    if asked_to_stop:
        raise KeyboardInterrupt
    return read_json(folder / DONE)


def _starting_model(context: Context, stage: Stage, phase: Phase) -> nn.Module:
    recipe = context.recipe
    if phase.index:
        folder = context.folder / context.plan[stage.id][phase.index - 1].folder / MODEL
        return artifact.load(folder, allow_code=context.allow_code)
    start = recipe.start_of(stage)
    if start != "model":
        return artifact.load(context.model_folder(start), allow_code=context.allow_code)
    return load_model(recipe.model, context.data.labels, seed=recipe.seed, allow_code=context.allow_code)


def _calibration(context: Context) -> list[dict[str, Any]]:
    calibration = context.recipe.data.calibration
    return context.data.calibration(calibration.samples, calibration.batch_size)


def _distiller(context: Context, stage: Stage) -> Distiller | None:
    if stage.distill is None or stage.teacher is None:
        return None
    recipe, teacher = context.recipe, stage.teacher
    if teacher == "self":
        teacher = recipe.start_of(stage)
    if teacher in context.plan:
        model = artifact.load(context.model_folder(teacher), allow_code=context.allow_code)
    else:
        spec = recipe.model
        if teacher != "model":
            spec = spec.model_copy(update={"path": teacher, "modeling": None})
        model = load_model(spec, context.data.labels, seed=recipe.seed, allow_code=context.allow_code, new_head=False)
    return Distiller(model, stage.distill, term=context.data.distillation, targets=context.data.kind.targets)


def _pruner(context: Context, stage: Stage, phase: Phase, model: nn.Module) -> Pruner:
    config, length = stage.prune, context.recipe.data.max_length
    assert config is not None
    structure = find_structure(model, config.ignore)
    extents: costs.Length = length
    if config.keep is not None and (config.keep.macs or config.keep.latency):
        extents = costs.measure_extents(model, structure, context.data.example(1, length))
    table = None
    if config.keep is not None and config.keep.latency:
        table = _latency_table(context, phase, structure, extents)
    return PRUNERS[type(config)](
        config,
        structure=structure,
        phase_steps=phase.steps,
        steps_per_epoch=phase.steps_per_epoch,
        lr=stage.train.lr if stage.train else 0.0,
        length=extents,
        latency=table,
    )


def _latency_table(context: Context, phase: Phase, structure: Structure, extents: costs.Length) -> Any:
    """Measured once by one process and kept: a resumed run and every rank must see the same numbers."""
    path = context.folder / phase.folder / "latency.json"
    if context.peers.is_main_process and not path.is_file():
        from mptrain.compress.structure.latency import measure_latency
        from mptrain.core.host import thread_count

        threads = thread_count(context.recipe.evaluate.latency.threads[0])
        write_json(path, measure_latency(structure, extents, threads=threads))
    context.peers.wait_for_everyone()
    return read_json(path)


def _palettized(context: Context, stage: Stage, model: nn.Module) -> dict[str, records.Palettized]:
    """Records of the weights; what a stage before made of them is forgotten."""
    assert stage.palettize is not None
    records.forget(model)
    model.to(context.peers.device)
    how, calibration = stage.palettize, context.recipe.data.calibration
    batches = context.data.labelled(calibration) if how.method == "skm" or how.size_budget is not None else None
    exported = [export.widths() for export in context.recipe.export if stage.id in export.of]
    widths = [bits for bits in palettize.WIDTHS if all(bits in known for known in exported)]
    return palettize.palettize(model, how, batches, seed=context.recipe.seed, widths=widths, ranks=context.ranks)


def _table_trainer(context: Context, stage: Stage, phase: Phase, model: nn.Module) -> TableTrainer | None:
    if not (phase.palettize and phase.steps and stage.palettize and stage.palettize.finetune and stage.train):
        return None
    return TableTrainer(_palettized(context, stage, model), stage.palettize.finetune, lr=stage.train.lr)


def _boundary(context: Context, stage: Stage, model: nn.Module, pruner: Pruner) -> nn.Module:
    """Cut what is masked for good; the quantizers follow."""
    pruner.restore_dense()
    kept, structure = pruner.kept(), pruner.structure
    state: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    if quantizers.is_quantized(model):
        model, config, tensors = quantizers.detach(model)
        state = config, tensors
    if isinstance(stage.prune, Fisher) and stage.prune.rescale:
        rescale.refit(model, structure, kept, _calibration(context))
    slices = linear_slices(structure, kept)
    shrink(model, structure, kept)
    if state is None:
        return model
    assert isinstance(stage.quantize, Qat)
    if stage.quantize.carry == "recalibrate":
        return quantizers.quantize(model, stage.quantize, _calibration(context))
    config, tensors = quantizers.slice_quantizers(*state, slices)
    return quantizers.attach(model, config, tensors)


def structure_facts(context: Context) -> dict[str, Any] | None:
    """Heads, channels and parameters kept per layer at the last stage that prunes, for the report."""
    pruned = [s for s in context.recipe.stages if s.prune is not None]
    if not pruned:
        return None
    folder = context.folder / context.plan[pruned[-1].id][0].folder
    return {"stage": pruned[-1].id, **read_json(folder / DONE)["structure"]}


def compressed_facts(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Rows of `records.describe` by stage, of the stages that end with compressed weights."""
    last = {s.id: context.folder / context.plan[s.id][-1].folder / DONE for s in context.recipe.stages}
    return {stage: rows for stage, done in last.items() if (rows := read_json(done)["compressed"])}


@contextmanager
def _graceful_stop(peers: PartialState) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C ends the step and writes a checkpoint, the second stops at once.

    With several processes each would see the signal at another step, so there Ctrl-C stops
    at once and the last regular checkpoint is where the run continues.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.warning("Stopping after this step; a second Ctrl-C stops at once.")

    if peers.num_processes > 1:
        yield lambda: False
        return
    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: signals belong to somebody else
        yield lambda: False
        return
    try:
        yield lambda: asked
    except training.Stopped:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
