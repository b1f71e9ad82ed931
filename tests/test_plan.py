"""Phases of a stage in optimizer steps, and the variants of a recipe."""

from __future__ import annotations

import pytest

from mptrain import recipe_file
from mptrain.plan import phases, steps_per_epoch, variants
from mptrain.recipe import Train

RECIPE = recipe_file.read("jpqd-bert", ["stages.jpqd.prune.schedule.end=1"]).recipe


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
    assert first.quantize_at_start and not second.quantize_at_start
    assert first.prune and not second.prune


def test_sequential_order_quantizes_after_the_boundary():
    recipe = recipe_file.read("jpqd-bert", ["stages.jpqd.quantize.start=after_prune"]).recipe
    first, second = phases(recipe.stage("jpqd"), rows=320)
    assert not first.quantize_at_start and second.quantize_at_start


def test_one_shot_pruning_has_a_phase_without_steps():
    recipe = recipe_file.read("jpqd-bert", ["stages.jpqd.prune.schedule.end=0"]).recipe
    first, second = phases(recipe.stage("jpqd"), rows=320)
    assert (first.name, first.steps) == ("prune", 0)
    assert second.steps == second.total


def test_a_warmup_never_ends_exactly_at_the_end_of_training():
    late = ["stages.jpqd.prune.schedule.end=999", "stages.jpqd.prune.schedule.unit=step"]
    recipe = recipe_file.read("jpqd-bert", late)
    first, second = phases(recipe.recipe.stage("jpqd"), rows=320)
    assert second.steps == 1 and first.end == first.total - 1


def test_variants_are_named_after_what_they_are():
    assert [(v.id, v.stage, v.precision) for v in variants(RECIPE)] == [
        ("baseline_fp32", "dense", "fp32"),
        ("pruned_fp32", "jpqd", "fp32"),
        ("jpqd_int8", "jpqd", "int8"),
        ("jpqd_int8_emb4", "jpqd", "int8_emb4"),
    ]
