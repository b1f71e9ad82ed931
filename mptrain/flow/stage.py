"""Running the phases of a stage: prepare the methods, train, finalize the methods, keep the model.

What a method does is its own (compress/base.py); a phase knows none by name. Between phases a model goes through its
folder on disk, in a run that was never interrupted as well, so that both do the same.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from mptrain.compress.base import Tools, TrainingMethod
from mptrain.compress.calibrate.ranks import Ranks
from mptrain.compress.methods import acting, finalized, methods_of, prepared, stand_still
from mptrain.compress.runtime import Torch
from mptrain.core.disk import read_json, write_json
from mptrain.data.load import Task, load_data
from mptrain.export.target import opened
from mptrain.flow import vocabulary
from mptrain.flow.stage_inputs import StageInputs
from mptrain.measure import memory
from mptrain.models import artifact
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe import Model
from mptrain.recipe.plan import Phase
from mptrain.train import phase as training
from mptrain.train.distill import Distiller
from mptrain.train.interrupt import Stopped
from mptrain.train.launch import current

log = logging.getLogger(__name__)

DONE = "done.json"
MODEL = "model"


@dataclass(frozen=True)
class Context:
    """What every phase needs. inputs: of each stage. data, processor: as `inputs` say, loaded."""

    inputs: dict[str, StageInputs]
    data: Task
    processor: Any
    folder: Path
    plan: dict[str, list[Phase]]
    peers: PartialState
    allow_code: bool
    _read: dict[str, Task] = field(default_factory=dict, repr=False)

    def task(self, stage_id: str) -> Task:
        """The data as the model at the end of a stage reads them: by its own tokenizer, where the stage or one that it
        starts from left another."""
        if stage_id == "model":
            return self.data
        inputs = self.inputs[stage_id]
        if not inputs.stage.rewrites:
            return self.task(inputs.start)
        if stage_id not in self._read:
            spec = inputs.model.model_copy(update={"path": str(self.model_folder(stage_id)), "modeling": None})
            processor = load_processor(spec, self.allow_code)
            self._read[stage_id] = load_data(
                inputs.data, inputs.model.task, processor, seed=inputs.seed, allow_code=self.allow_code
            )
        return self._read[stage_id]

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.peers.process_index, self.peers.num_processes)

    def model_folder(self, stage_id: str) -> Path:
        """Where the model at the end of a stage is; "model" is the one that the recipe starts from."""
        if stage_id == "model":
            return self.folder / "stages" / "model" / MODEL
        return self.folder / self.plan[stage_id][-1].folder / MODEL

    def phase_folders(self, stage_id: str) -> list[Path]:
        """Of the stage and of those it starts from, the last first, back to one that left another tokenizer."""
        found: list[Path] = []
        while stage_id != "model" and not self.inputs[stage_id].stage.rewrites:
            found += [self.folder / phase.folder for phase in reversed(self.plan[stage_id])]
            stage_id = self.inputs[stage_id].start
        return found


@dataclass
class Trained:
    """rows: of the training log. before_s: what earlier, killed attempts trained. stopped: the user asked to stop."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    before_s: float = 0.0
    stopped: bool = False


def keep_start(context: Context, spec: Model, seed: int) -> None:
    """Save the model that the recipe starts from."""
    folder = context.model_folder("model")
    if context.peers.is_main_process and not folder.is_dir():
        model = load_model(spec, context.data.labels, seed=seed, allow_code=context.allow_code)
        artifact.save(model.eval(), folder, context.processor)


def run_phase(context: Context, phase: Phase) -> dict[str, Any]:
    """Run a phase unless it is done.

    Returns {"history": rows, "wall_s": seconds, "methods": {field of the stage: facts}}.
    """
    folder, inputs = context.folder / phase.folder, context.inputs[phase.stage]
    if (folder / DONE).is_file():
        return read_json(folder / DONE)
    memory.give_back()  # what the phase before took
    begun = time.monotonic()
    task = context.task(inputs.start)
    methods = methods_of(getattr(inputs.stage, field) for field in phase.methods)
    tools = _tools(context, inputs, phase)
    model, device = prepared(methods, _starting_model(context, inputs, phase), tools), context.peers.device
    stand_still(inputs.stage.methods, model)
    if current(context.peers.num_processes).sharding:
        device = torch.device("cpu")  # shards move by themselves; all of it may not fit
    trained = _train(context, inputs, phase, model.to(device), acting(methods)) if phase.steps else Trained()
    model = finalized(methods, model.to("cpu"), tools)
    if context.peers.is_main_process:
        others = [made for method in methods if (made := method.processor()) is not None]
        artifact.save(model.eval(), folder / MODEL, others[-1] if others else task.processor)
        for method in methods:
            method.save(folder / MODEL)
        wall = time.monotonic() - begun + trained.before_s
        done = {method.config.field: method.facts() for method in methods}
        write_json(folder / DONE, {"history": trained.rows, "wall_s": round(wall, 3), "methods": done})
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        (folder / training.BEST).unlink(missing_ok=True)
    context.peers.wait_for_everyone()
    if trained.stopped:
        raise KeyboardInterrupt
    return read_json(folder / DONE)


def method_facts(context: Context) -> dict[str, dict[str, Any]]:
    """What the methods of each stage did, by the field of the stage; for the report."""
    found: dict[str, dict[str, Any]] = {}
    for stage, phases in context.plan.items():
        done = [read_json(context.folder / phase.folder / DONE)["methods"] for phase in phases]
        found[stage] = {field: facts for phase in done for field, facts in phase.items()}
        if context.inputs[stage].stage.rewrites:
            before, after = context.task(context.inputs[stage].start), context.task(stage)
            found[stage]["vocabulary"] |= {"changed": vocabulary.changed(before, after, "test")}
    return found


def _tools(context: Context, inputs: StageInputs, phase: Phase) -> Tools:
    data, calibration, train = context.task(inputs.start), inputs.data.calibration, inputs.stage.train
    return Tools(
        inputs=lambda: data.calibration(calibration.samples, calibration.batch_size),
        counts=lambda: vocabulary.counts(data),
        processor=data.processor,
        labelled=lambda: data.labelled(calibration),
        loss=data.model_loss,
        score=data.validated,
        example=lambda: data.example(1, inputs.data.max_length),
        length=inputs.data.max_length,
        seed=inputs.seed,
        steps=phase.steps,
        steps_per_epoch=phase.steps_per_epoch,
        lr=train.lr if train else 0.0,
        widths=inputs.widths,
        whole=None if inputs.against in (None, inputs.start) else partial(_ended, context, inputs, inputs.against),
        runtime=Torch if inputs.target is None else partial(opened, inputs.target),
        device=context.peers.device,
        ranks=context.ranks,
        once=lambda name, make: _once(context, context.folder / phase.folder / f"{name}.json", make),
        shared=lambda name, make: _kept(context.folder / "stages" / f"{name}.json", make),
        counted=inputs.counted(),
    )


def _once(context: Context, path: Path, make: Callable[[], Any]) -> Any:
    """Measured by one process and kept: a resumed run and every rank must see the same numbers."""
    if context.peers.is_main_process:
        _kept(path, make)
    context.peers.wait_for_everyone()
    return read_json(path)


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def _starting_model(context: Context, inputs: StageInputs, phase: Phase) -> nn.Module:
    if phase.index:
        folder = context.folder / context.plan[phase.stage][phase.index - 1].folder / MODEL
        return artifact.load(folder, allow_code=context.allow_code)
    return _ended(context, inputs, inputs.start)


def _ended(context: Context, inputs: StageInputs, stage: str) -> nn.Module:
    """The model at the end of an earlier stage, or "model", the one that the recipe starts from."""
    if stage != "model":
        return artifact.load(context.model_folder(stage), allow_code=context.allow_code)
    return load_model(inputs.model, context.data.labels, seed=inputs.seed, allow_code=context.allow_code)


def _train(
    context: Context, inputs: StageInputs, phase: Phase, model: nn.Module, compressors: Sequence[TrainingMethod]
) -> Trained:
    assert inputs.stage.train is not None
    with _graceful_stop(context.peers) as stop:
        rows, before_s = training.train_phase(
            model,
            phase=phase,
            train=inputs.stage.train,
            data=context.task(inputs.start),
            folder=context.folder / phase.folder,
            seed=inputs.seed,
            stop=stop,
            precision=inputs.precision,
            compressors=compressors,
            distiller=_distiller(context, inputs),
            watch=inputs.peaks,
        )
        # the user may ask in the last step or evaluation, after which no checkpoint stops the training
        return Trained(rows, before_s, stop())


def _distiller(context: Context, inputs: StageInputs) -> Distiller | None:
    stage, teacher = inputs.stage, inputs.teacher
    if stage.distill is None or teacher is None:
        return None
    if teacher in context.plan:
        model = artifact.load(context.model_folder(teacher), allow_code=context.allow_code)
    else:
        spec = inputs.model
        if teacher != "model":
            spec = spec.model_copy(update={"path": teacher, "modeling": None, "module": None})
        model = load_model(spec, context.data.labels, seed=inputs.seed, allow_code=context.allow_code, new_head=False)
    data = context.task(inputs.start)
    taught = context.task(teacher) if teacher in context.plan else context.data
    ids = None if taught is data else vocabulary.ids_in(data.processor, taught.processor)
    return Distiller(model, stage.distill, term=data.distillation, targets=data.kind.targets, ids=ids)


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
    except Stopped:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
