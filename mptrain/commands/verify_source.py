"""A package against the model that it was made from, under the names and with the inputs that each of them has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.core.errors import ExportError
from mptrain.core.hooks import is_quantized
from mptrain.core.signature import Batch, by_name, probed, without_cache
from mptrain.mil import wrapping
from mptrain.mil.program import Program
from mptrain.mil.wrapping import Classifier, Scores
from mptrain.models.load import load_model, read_config
from mptrain.models.samples import guess_task
from mptrain.recipe import Checkpoint, Model, tasks
from mptrain.verify import overflow
from mptrain.verify.outputs import rows


def load_source(path: str, task: str | None = None, allow_code: bool = False) -> nn.Module:
    """The model in float32 and eval mode; of one with fake quantizers its weights alone, as a package stores them."""
    if task is not None:
        tasks.check(task, "--task")
    task = task or guess_task(read_config(Checkpoint(path=path), allow_code))
    return as_stored(load_model(Model(path=path, task=task), None, seed=0, allow_code=allow_code))


def as_stored(model: nn.Module) -> nn.Module:
    """The model in float32 and eval mode, of one with fake quantizers its weights alone."""
    if is_quantized(model):
        from mptrain.compress.quantize.integers import weight_only

        return weight_only(model).eval()
    return model.float().eval()


def compared(model: nn.Module, program: Program, batches: list[Batch], outputs: list[dict[str, Tensor]]) -> dict:
    """JSON facts. batches: of the package. outputs: its floating ones, to each batch.

    A package may prepare its pictures and make probabilities of scores (`mil.wrapping`). Where the program leaves open
    which of it belongs to the model, the reading counts under which package and model agree best. A single input or
    output may have another name than the model's. Raises ExportError for names or sizes that do not fit.
    """
    found = []
    for preparation in wrapping.preparations(program):
        given = [_named_for(model, wrapping.prepared(program, preparation, batch)) for batch in batches]
        pairs = _expected(model, given, outputs, wrapping.classifier(program))
        whole = min((overflow.worst(differences) for differences in pairs), key=lambda worst: worst.error)
        found.append((whole, wrapping.described(program, preparation)))
    whole, words = min(found, key=lambda one: one[0].error)
    facts = {"max_abs_diff": whole.max_diff, "cosine": whole.cosine, "error": whole.error, "finite": whole.finite}
    return facts | {"model_reads": words, "labels_differ": _labels(model, wrapping.classifier(program))}


def _named_for(model: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    parameters = inspect.signature(model.forward).parameters
    takes = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [name for name in batch if name not in takes]
    main = getattr(model, "main_input_name", None)
    if unknown and len(batch) == 1 and main in takes:
        return {main: next(iter(batch.values()))}
    if unknown:
        raise ExportError(
            f"the package has the inputs {list(batch)}, of which the source model takes no {unknown}; it takes"
            f" {takes[:8]}. Convert it with these names (ct.TensorType(name=…))"
        )
    return dict(batch)


@torch.no_grad()
def _expected(
    model: nn.Module, batches: list[Batch], outputs: list[dict[str, Tensor]], classes: Classifier | None
) -> list[list[overflow.Difference]]:
    """To each way in which the package may make its outputs of the model's, the differences on every batch."""
    try:
        signature = probed(model.eval(), batches[0])
        with without_cache(model):
            answers = [by_name(model(**batch)) for batch in batches]
    except Exception as error:
        sizes = {name: list(value.shape) for name, value in batches[0].items()}
        raise ExportError(
            f"the source model cannot read inputs of the package's sizes {sizes} ({type(error).__name__}:"
            f" {str(error).strip()[:300]}). Give the model that the package was made from, or --task"
        ) from error
    made: list[Scores | None] = [None] if classes is None else list(dict.fromkeys((classes.made, "as they are")))
    differences = []
    for way in made:
        of_way = []
        for batch, answer, found in zip(batches, answers, outputs):
            if classes is None or way is None:
                expected, got = _paired(answer, found)
                kept = replace(signature, outputs=tuple(port for port in signature.outputs if port.name in expected))
                expected, got = rows(expected, batch, kept), rows(got, batch, kept)
            else:
                expected, got = _scores(answer, found, classes, way)
            of_way.append(overflow.compare(expected, got))
        differences.append(of_way)
    return differences


def _paired(answer: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of the model and of the package under the model's names."""
    missing = [name for name in found if name not in answer]
    if missing and len(found) == 1:
        alike = [name for name, value in answer.items() if value.shape == found[missing[0]].shape]
        if len(alike) == 1:
            return {alike[0]: answer[alike[0]]}, {alike[0]: found[missing[0]]}
    if missing:
        raise ExportError(f"the package has the outputs {list(found)}, the model gives {list(answer)}")
    return {name: answer[name] for name in found}, found


def _scores(
    answer: dict[str, Tensor], found: dict[str, Tensor], classes: Classifier, made: Scores
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    count = len(classes.classes)
    fitting = {name: v for name, v in answer.items() if v.is_floating_point() and v.shape[-1:] == (count,)}
    if not fitting:
        shapes = {name: list(value.shape) for name, value in answer.items()}
        raise ExportError(f"the package has {count} classes, the model gives {shapes}: not a score to each of them")
    name = "logits" if "logits" in fitting else next(iter(fitting))
    value = fitting[name].float().reshape(-1, count)
    wanted = value.softmax(-1) if made == "softmax" else value.sigmoid() if made == "sigmoid" else value
    return {name: wanted}, {name: found[classes.scores].reshape(-1, count)}


def _labels(model: nn.Module, classes: Classifier | None) -> list[dict[str, Any]]:
    """Where the package names a class in another way than the model, which may stand for another order."""
    known = getattr(getattr(model, "config", None), "id2label", None) or {}
    if classes is None or all(str(label) == f"LABEL_{index}" for index, label in known.items()):
        return []
    return [
        {"class": index, "package": label, "model": known[index]}
        for index, label in enumerate(classes.classes)
        if index in known and str(known[index]) != str(label)
    ]
