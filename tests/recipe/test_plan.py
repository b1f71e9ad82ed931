"""Phases of a stage in optimizer steps, and the variants of a recipe."""

from __future__ import annotations

import re
from functools import partial

import pytest

from mptrain.core.errors import RecipeError
from mptrain.recipe import Train, file
from mptrain.recipe.plan import phases, steps_per_epoch, variants


def fisher(*changes):
    """A bundled recipe that prunes while it trains, with two epochs of that."""
    return file.read("quickstart", ["stages.jpqd.train.epochs=2", *changes]).recipe


RECIPE = fisher("stages.jpqd.prune.schedule.end=1", "stages.jpqd.quantize.start=joint")


def train(**kwargs):
    return Train(epochs=2, lr=1e-4, **kwargs)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "world", "expected"),
    [
        (100, 32, 1, 1, 3),
        (100, 32, 2, 1, 2),
        (100, 32, 1, 2, 1),
        (10, 32, 1, 1, 1),
        (128, 32, 1, 2, 2),
        (128, 16, 4, 2, 1),
    ],
)
def test_steps_per_epoch(rows, batch, accumulation, world, expected):
    assert steps_per_epoch(rows, train(batch_size=batch, accumulation=accumulation), world) == expected


def test_a_pruning_stage_has_two_phases_that_share_one_step_axis():
    first, second = phases(RECIPE.stage("jpqd"), rows=320)
    assert (first.name, first.start, first.end) == ("warmup", 0, 10)
    assert (second.name, second.start, second.end) == ("finetune", 10, second.total)
    assert first.methods == ("prune", "quantize") and second.methods == ()


def test_by_default_quantizers_come_after_the_boundary():
    recipe = fisher()
    first, second = phases(recipe.stage("jpqd"), rows=320)
    assert first.methods == ("prune",) and second.methods == ("quantize",)


def test_one_shot_pruning_has_a_phase_without_steps():
    recipe = fisher("stages.jpqd.prune.schedule.end=0")
    first, second = phases(recipe.stage("jpqd"), rows=320)
    assert (first.name, first.steps) == ("prune", 0)
    assert second.steps == second.total


def jpqd_phases(rows, *schedule):
    stage = fisher(*(f"stages.jpqd.prune.schedule.{s}" for s in schedule)).stage("jpqd")
    return phases(stage, rows)


def test_a_warmup_never_ends_exactly_at_the_end_of_training():
    first, second = jpqd_phases(320, "end=1.99")
    assert second.steps == 1 and first.end == first.total - 1
    first, second = jpqd_phases(320, "end=19", "unit=step")
    assert second.steps == 1 and first.end == first.total - 1 == 19
    assert [p.steps for p in jpqd_phases(8, "end=0.75")] == [1, 1], "one step to an epoch"


@pytest.mark.parametrize("end", [20, 1000000])
def test_a_warmup_of_more_steps_than_the_stage_has_is_an_error(end):
    expected = rf"stages.jpqd.prune.schedule.end \({end} steps\) must be less than the 20 steps of the stage \(10 to"
    with pytest.raises(RecipeError, match=expected):
        jpqd_phases(320, f"end={end}", "unit=step")


def test_variants_are_named_after_what_they_are():
    assert [(v.id, v.stage, v.precision) for v in variants(RECIPE)] == [
        ("baseline_fp32", "dense", "fp32"),
        ("pruned_fp32", "jpqd", "fp32"),
        ("jpqd_int8", "jpqd", "int8"),
        ("jpqd_int8_emb4", "jpqd", "int8_emb4"),
    ]


def changed(*stages, of=("dense", "jpqd"), precision=("fp32", "int8"), more=()):
    """quickstart with more stages, another OpenVINO export, and more exports."""
    data, _ = file.parse(file.find("quickstart").read_text(), "quickstart")
    data["stages"] += stages
    data["export"] = [{"id": "ov", "format": "openvino", "of": list(of), "precision": list(precision)}, *more]
    return file.validate(data, "quickstart")


TUNED = {"id": "jpqd_pruned", "from": "dense", "train": {"epochs": 1, "lr": 1e-4}}
AGAIN = {"id": "again", "train": {"epochs": 2, "lr": 1e-4}, "prune": {"method": "fisher", "keep": {"macs": 0.5}}}
INT4 = {"id": "int4", "from": "dense", "quantize": {"mode": "weight_only"}}
NO_STAGE = {"id": "ml", "format": "coreml", "of": []}
NO_PRECISION = {"id": "ml", "format": "coreml", "of": ["dense"], "precision": []}


@pytest.mark.parametrize("bundled", [path.stem for path in file.bundled()])
def test_bundled_recipes_export_every_stage_that_they_name(bundled):
    recipe = file.read(bundled).recipe
    assert {(v.export.id, v.stage) for v in variants(recipe)} == {(e.id, s) for e in recipe.export for s in e.of}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            partial(changed, precision=["int8"]),
            "export.ov.precision: stage dense has none of [int8]; it can be fp32 or fp16: add",
        ),
        (partial(changed, precision=["compressed"]), "stage dense has none of [compressed]"),
        (
            partial(changed, INT4, of=["dense", "int4"]),
            "stage int4 has none of [fp32, int8]; it can be compressed",
        ),
        (partial(changed, precision=[]), "stage dense has none of []"),
        (
            partial(changed, more=[NO_PRECISION]),
            "export.ml.precision: stage dense has none of []",
        ),
        (partial(changed, of=[]), "export.ov.of: names no stage, got []; give some of ['dense', 'jpqd']"),
        (partial(changed, more=[NO_STAGE]), "export.ml.of: names no stage"),
    ],
)
def test_a_stage_of_an_export_without_a_model_is_an_error(recipe, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe()


def test_precisions_that_fit_another_stage_are_left_out():
    every = ["fp32", "int8", "compressed"]
    assert [v.id for v in variants(changed(INT4, of=["dense", "jpqd", "int4"], precision=every))] == [
        "baseline_fp32", "pruned_fp32", "jpqd_int8", "int4_compressed",
    ]  # fmt: skip


def test_two_variants_with_one_id_are_an_error():
    again = AGAIN | {"quantize": {"mode": "qat"}}
    expected = (
        "export.ov: stage jpqd_pruned in fp32 would be the variant 'jpqd_pruned_fp32', which stage jpqd of export.ov"
    )
    with pytest.raises(RecipeError, match=re.escape(expected)):
        changed(TUNED, again, of=["jpqd", "jpqd_pruned"], precision=["fp32"])
    other_format = {"id": "x", "format": "coreml", "of": ["dense"], "precision": ["fp32"]}
    with pytest.raises(RecipeError, match="'baseline_x_fp32', which stage baseline_x of"):
        changed(TUNED | {"id": "baseline_x"}, of=["baseline_x"], precision=["fp32"], more=[other_format])


def test_a_model_asked_for_twice_is_exported_once():
    twice = {"id": "more", "format": "openvino", "of": ["dense", "dense"], "precision": ["fp32", "fp16"]}
    assert [v.id for v in variants(changed(of=["dense"], precision=["fp32"], more=[twice]))] == [
        "baseline_fp32", "baseline_fp16",
    ]  # fmt: skip
