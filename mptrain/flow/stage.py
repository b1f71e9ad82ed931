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
from mptrain.compress.methods import acting, finalized, methods_of, prepared, stand_still
from mptrain.compress.runtime import Torch
from mptrain.core.disk import read_json, write_json
from mptrain.export.target import opened
from mptrain.flow import vocabulary
from mptrain.flow.context import MODEL, Context
from mptrain.flow.stage_inputs import StageInputs
from mptrain.flow.teacher import distiller
from mptrain.measure import memory
from mptrain.models import artifact
from mptrain.models.load import load_model
from mptrain.recipe import Model
from mptrain.recipe.plan import Phase
from mptrain.train import phase as training
from mptrain.train.interrupt import Stopped
from mptrain.train.launch import current

log = logging.getLogger(__name__)

DONE = "done.json"


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
            distiller=distiller(context, inputs),
            watch=inputs.peaks,
        )
        # the user may ask in the last step or evaluation, after which no checkpoint stops the training
        return Trained(rows, before_s, stop())


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
