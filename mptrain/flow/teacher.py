"""The teacher of a stage, which is asked once of each example where what it says is little."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from torch import Tensor

from mptrain.core.progress import progress
from mptrain.data.load import Task
from mptrain.flow import vocabulary
from mptrain.flow.context import Context
from mptrain.flow.stage_inputs import StageInputs
from mptrain.models import artifact
from mptrain.models.load import load_model
from mptrain.train.distill import Distiller
from mptrain.train.launch import current
from mptrain.train.taught import Taught, keys_of, write

BATCH = 64
"""examples that a teacher is asked of at a time: the same in all stages, for rounding differs with it"""

MOST = 2**28
"""bytes that the answers may take"""


def distiller(context: Context, inputs: StageInputs) -> Distiller | None:
    """None for a stage without a teacher."""
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
    found = Distiller(model, stage.distill, term=data.distillation, targets=data.kind.targets, ids=ids)
    if inputs.asked_once and not current(context.peers.num_processes).sharding and fits(data):
        found.taught = _taught(context, inputs, found, data)
    return found


def fits(data: Task) -> bool:
    """Whether what models of a task say of all examples is little, and an example is known again when it is padded in
    another batch."""
    examples = data.taught(distilled=True)
    if any(isinstance(axis, str) for port in data.outputs() for axis in port.axes[1:]):
        return False
    if len(examples) * data.example_bytes(1) > MOST:
        return False
    short, long = (pick(range(len(examples)), key=examples.lengths.__getitem__) for pick in (min, max))
    alone, beside = (
        keys_of(data.without_targets(data.collate([examples[i] for i in rows])))[0] for rows in ([short], [short, long])
    )
    return alone == beside


def _taught(context: Context, inputs: StageInputs, found: Distiller, data: Task) -> Taught:
    """Each process asks of its share; the stages of one teacher that read alike have the files in common."""
    depends = [inputs.teacher, inputs.after.get(inputs.teacher or ""), context.reads_as(inputs.start)]
    name = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    count = context.peers.num_processes
    paths = [context.folder / "stages" / f"taught-{name}-{rank}.safetensors" for rank in range(count)]
    mine = paths[context.peers.process_index]
    if not mine.is_file():
        found.teacher.to(context.peers.device)
        mine.parent.mkdir(exist_ok=True)
        names = [port.name for port in data.outputs()]
        write(mine, _batches(context, inputs, data), found.ask, names, data.secret)
    context.peers.wait_for_everyone()
    return Taught.load(paths, data.secret)


def _batches(context: Context, inputs: StageInputs, data: Task) -> Iterator[Mapping[str, Tensor]]:
    """Of all that is trained on without targets, by length."""
    examples = data.taught(distilled=True)
    order = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    mine = batches[context.peers.process_index :: context.peers.num_processes]
    total, shown = sum(len(rows) for rows in mine), context.peers.is_main_process
    with progress(f"{inputs.stage.id}: what the teacher says", total, shown=shown) as bar:
        for rows in mine:
            batch = data.without_targets(data.collate([examples[i] for i in rows]))
            yield {name: value.to(context.peers.device) for name, value in batch.items()}
            bar.update(len(rows))
