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
from torch import nn

from mptrain import artifact
from mptrain.compress import fisher, magnitude, movement, quantizers
from mptrain.compress.shrink import linear_slices, shrink
from mptrain.compress.structure import Structure, find_structure
from mptrain.errors import TrainingError, UserError
from mptrain.inputs.data import TaskData
from mptrain.inputs.model import load_model
from mptrain.plan import Phase
from mptrain.recipe import Fisher, Magnitude, Movement, Prune, Qat, Recipe, Stage
from mptrain.run_folder import read_json, write_json
from mptrain.train import phase as training
from mptrain.train.distill import Distiller

log = logging.getLogger(__name__)

DONE = "done.json"
MODEL = "model"


@dataclass(frozen=True)
class Context:
    """What every phase needs."""

    recipe: Recipe
    data: TaskData
    processor: Any
    folder: Path
    plan: dict[str, list[Phase]]
    peers: PartialState
    allow_code: bool

    def model_folder(self, stage_id: str) -> Path:
        """Where the model at the end of a stage is."""
        return self.folder / self.plan[stage_id][-1].folder / MODEL


def run_phase(context: Context, phase: Phase) -> dict[str, Any]:
    """Run a phase unless it is done. Returns {"history": rows, "wall_s": seconds, "structure": …}."""
    folder = context.folder / phase.folder
    if (folder / DONE).is_file():
        return read_json(folder / DONE)
    begun = time.monotonic()
    stage = context.recipe.stage(phase.stage)
    model = _starting_model(context, stage, phase)
    pruner = _pruner(stage.prune, model, phase, stage) if phase.prune and stage.prune else None
    if phase.quantize_at_start and stage.quantize is not None:
        model = quantizers.quantize(model, stage.quantize, _calibration(context))
    model.to(context.peers.device)
    history: list[dict[str, Any]] = []
    trained_s = 0.0
    if pruner is not None:
        pruner.prepare(model)
        if phase.steps == 0:
            pruner.collect(model, context.data.labelled(context.recipe.data.calibration))
    begun_training = time.monotonic()
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
                compressors=[pruner] if pruner is not None else [],
                distiller=_distiller(context, stage),
            )
        trained_s -= time.monotonic() - begun_training
    model.to("cpu")
    if pruner is not None:
        model = _boundary(context, stage, model, pruner)
    if context.peers.is_main_process:
        artifact.save(model.eval(), folder / MODEL, context.processor)
        wall = time.monotonic() - begun + trained_s
        write_json(folder / DONE, {"history": history, "wall_s": round(wall, 3)})
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        (folder / "best.safetensors").unlink(missing_ok=True)
    context.peers.wait_for_everyone()
    return read_json(folder / DONE)


def _starting_model(context: Context, stage: Stage, phase: Phase) -> nn.Module:
    recipe = context.recipe
    if phase.index:
        return artifact.load(context.folder / context.plan[stage.id][phase.index - 1].folder / MODEL)
    start = recipe.start_of(stage)
    if start != "model":
        return artifact.load(context.model_folder(start))
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
        model = artifact.load(context.model_folder(teacher))
    else:
        spec = recipe.model if teacher == "model" else recipe.model.model_copy(update={"path": teacher})
        model = load_model(spec, context.data.labels, seed=recipe.seed, allow_code=context.allow_code)
    return Distiller(model, stage.distill, causal=recipe.model.task == "causal-lm")


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
