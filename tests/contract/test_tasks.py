"""What must hold for every row of TASKS and its class: a task that passes here works in the flow and in the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optimum.intel as optimum
import pytest
import torch
import transformers
from kit import report_sample, tiny_tasks
from transformers.pipelines import PIPELINE_REGISTRY

from mptrain.core.errors import ModelError
from mptrain.core.signature import BATCH
from mptrain.data.load import load_data, task_class
from mptrain.data.tasks.base import BATCH_BYTES, Task
from mptrain.data.tasks.metrics import Score
from mptrain.measure.intervals import interval, paired_difference
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe import TASKS, Data, Distill, Model
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page
from mptrain.train.distill import Distiller, check_asked, check_terms

_folders: list[TemporaryDirectory] = []


@dataclass(frozen=True)
class Loaded:
    data: Task
    model: torch.nn.Module
    other: torch.nn.Module
    """of the same architecture, with other weights"""
    perfect: Any


@cache
def loaded(name: str) -> Loaded:
    _folders.append(TemporaryDirectory())
    folder = Path(_folders[-1].name)
    case = tiny_tasks.CASES[name]
    made = case.make(folder)
    spec = Model.model_validate({"path": str(folder / "model"), "task": name, **made["model"]})
    data = load_data(Data.model_validate(made["data"]), name, load_processor(spec, True), seed=1)
    model, other = (load_model(spec, data.labels, seed=seed, allow_code=True) for seed in (0, 1))
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Loaded(data, model, other, case.perfect)


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return loaded(name)


def batch_of(data: Task, rows: int = 5) -> Mapping[str, torch.Tensor]:
    return data.collate([data.train[i] for i in range(rows)])


def outputs_of(case: Loaded, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        found = model(**case.data.without_targets(dict(batch)))
    return {port.name: found[port.name] for port in case.data.outputs()}


def scored(case: Loaded, forward, split: str = "test") -> list[Score]:
    """As `evaluate`, for a forward that sees targets."""
    data, examples = case.data, case.data._splits[split]
    found = []
    for i in range(len(examples)):
        batch = data.collate([examples[i]])
        found += data.read(data.answers(forward, batch), batch, split, [i])
    return data.score(split, found)


def test_the_row_and_the_class_are_each_others_and_name_what_there_is(name):
    kind = TASKS[name]
    assert kind.name == name and task_class(kind).kind is kind
    assert [c for c in kind.columns.values() if not c.target and c.default], "a model sees something"
    assert all(column.holds for column in kind.columns.values())
    if kind.head is not None:
        assert hasattr(transformers, kind.head)
    if kind.optimum is not None:
        assert hasattr(optimum, kind.optimum)
    known = {**PIPELINE_REGISTRY.supported_tasks, **PIPELINE_REGISTRY.task_aliases}
    assert kind.pipeline in known or kind.pipeline is None


def test_batches_hold_inputs_and_the_targets_of_the_row(case):
    batch = batch_of(case.data)
    inputs = case.data.without_targets(dict(batch))
    assert set() < set(batch) - set(inputs) <= set(case.data.kind.targets)
    assert all(value.dtype in (torch.int64, torch.int32, torch.float32) for value in batch.values())
    assert len({len(value) for value in inputs.values()}) == 1
    assert len(case.data.train.lengths) == len(case.data.train) > 5


def test_examples_have_the_size_that_was_asked_for(case):
    for batch, times in ((1, 1), (3, 2)):
        length = times * max(8, case.data.min_length)
        found = case.data.example(batch, length)
        assert not set(found) & set(case.data.kind.targets)
        assert {len(value) for value in found.values()} == {batch}
        if case.data.kind.unit == "tokens":
            assert {value.shape[1] for value in found.values()} == {length}


def test_the_signature_is_that_of_a_model(case):
    signature = case.data.signature()
    for batch, times in ((1, 1), (3, 2)):
        inputs = case.data.example(batch, times * max(8, case.data.min_length))
        with torch.no_grad():
            outputs = case.model(**inputs)
        assert signature.input_names == list(inputs)
        sizes: dict[str, int] = {BATCH: batch}
        for port in (*signature.inputs, *signature.outputs):
            value = inputs[port.name] if port.name in inputs else outputs[port.name]
            assert str(value.dtype) == f"torch.{port.dtype}" and value.dim() == len(port.axes)
            for axis, size in zip(port.axes, value.shape):
                assert size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
    first = signature.input_names[0]
    assert case.data.signature([first]).input_names == [first]


def test_perfect_predictions_have_the_best_score(case):
    perfect = scored(case, lambda batch: case.perfect(case.data, batch))
    some = scored(case, lambda batch: outputs_of(case, case.model, batch))
    assert [s.name for s in perfect] == [s.name for s in some] and perfect[0].n == some[0].n
    for best, other in zip(perfect, some):
        sign = 1 if best.higher_is_better else -1
        assert sign * best.value >= sign * other.value or np.isnan(other.value), best.name
        if best.unit in ("fraction", "coefficient") and best.higher_is_better:
            assert best.value == pytest.approx(1.0), best.name
    assert perfect[0].value != some[0].value


def test_evaluation_gives_the_scores_of_a_plain_loop(case):
    plain = scored(case, lambda batch: outputs_of(case, case.model, batch), "validation")
    found = case.data.evaluate(lambda batch: case.model(**batch), "validation")
    for a, b in zip(plain, found, strict=True):
        assert (a.name, a.n, a.of, a.unit) == (b.name, b.n, b.of, b.unit)
        assert b.value == pytest.approx(a.value, abs=1e-4, nan_ok=True)


def test_scores_have_intervals_and_survive_the_run_folder(case):
    for score in scored(case, lambda batch: outputs_of(case, case.other, batch)):
        again = Score.from_kept(json.loads(json.dumps(score.kept())), case.data.measures)
        assert (again.name, again.of, again.unit, again.higher_is_better) == (
            score.name,
            score.of,
            score.unit,
            score.higher_is_better,
        )
        np.testing.assert_array_equal(again.stats, score.stats)
        low, high = interval(score)
        assert low <= score.value <= high
        same = paired_difference(score, again)
        assert (same.value, same.verdict(score.higher_is_better)) == (0.0, "tied")


def test_a_model_agrees_with_itself_and_not_with_another(case):
    batch = batch_of(case.data, 12)
    inputs = case.data.without_targets(dict(batch))
    ours, theirs = (outputs_of(case, model, batch) for model in (case.model, case.other))
    agree = type(case.data).agreement
    np.testing.assert_array_equal(agree(ours, ours, inputs), 1.0)
    other = agree(ours, {name: value.numpy() for name, value in theirs.items()}, inputs)
    assert other.min() >= 0 and other.max() <= 1 and other.mean() < 0.97


def test_the_loss_has_gradients(case):
    case.model.zero_grad()
    case.data.model_loss(case.model, dict(batch_of(case.data))).backward()
    gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)
    case.model.zero_grad()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(case):
    batch = batch_of(case.data)
    ours, theirs = (outputs_of(case, model, batch) for model in (case.model, case.other))
    same = case.data.distillation(ours, ours, batch, 2.0)
    ours = {name: value.clone().requires_grad_() for name, value in ours.items()}
    other = case.data.distillation(ours, theirs, batch, 2.0)
    assert float(same) == pytest.approx(0.0, abs=1e-6) and float(other.detach()) > 1e-5
    other.backward()
    assert all(value.grad.abs().max() > 0 for value in ours.values())


def test_hidden_states_can_be_compared(case, name):
    settings = Distill(weight=0.0, hidden=1.0)
    if tiny_tasks.CASES[name].own:
        with pytest.raises(ModelError, match=r"distill\.hidden: the forward of .* takes no output_hidden_states"):
            check_asked(settings, case.model)
        return
    distiller = Distiller(case.other, settings, term=case.data.distillation, targets=case.data.kind.targets)
    check_terms(settings, case.model, case.data.example(2, 2 * case.data.min_length), pruned=False)
    batch = dict(batch_of(case.data))
    with torch.no_grad():
        outputs = case.model(**case.data.without_targets(batch), **distiller.extra_outputs())
        assert float(distiller(batch, outputs, torch.tensor(0.0)).total) > 1e-6


def test_a_floor_is_there_where_the_row_names_one(case):
    floor = case.data.floor(0)
    assert (floor is None) == (case.data.kind.floor is None)
    if floor is not None:
        main = scored(case, lambda batch: outputs_of(case, case.model, batch))[0]
        assert (floor.name, floor.n, floor.of, floor.unit) == (main.name, main.n, main.of, main.unit)
        assert np.isfinite(floor.value)


def test_batches_to_score_are_bounded_in_bytes(case):
    size = case.data.batch_size("test")
    longest = max(case.data.test.lengths)
    assert 1 <= size <= 64 and (size == 1 or size * case.data.example_bytes(longest) <= BATCH_BYTES)
    exact = [
        p for p in case.data.outputs() if all(a in (BATCH, case.data.kind.unit) or isinstance(a, int) for a in p.axes)
    ]
    given = outputs_of(case, case.model, case.data.example(1, max(8, case.data.min_length)))
    if len(exact) == len(given) and case.data.kind.unit != "samples":
        assert case.data.example_bytes(8) == sum(4 * value.numel() for value in given.values())


def test_a_report_and_its_card_render(name, case):
    kind = TASKS[name]
    scores = scored(case, lambda batch: outputs_of(case, case.other, batch))
    recipe = report_sample.recipe(model={"path": "packaged:x", "task": name}, gates={"max_drop": 0.01})
    variants = [replace(v, scores=scores) for v in report_sample.variants()]
    floor = case.data.floor(0)
    report = report_sample.report(recipe=recipe, variants=variants, floor=floor, data_facts=case.data.facts)
    text = card(report)
    assert f"pipeline_tag: {kind.tag}" in text
    assert (kind.optimum or "compile_model") in text
    assert floor is None or kind.floor in markdown(report)
    measured = f"{100 * scores[0].value:.2f}%" if scores[0].unit == "fraction" else f"{scores[0].value:.4g}"
    assert measured in markdown(report) and measured in page(report)
