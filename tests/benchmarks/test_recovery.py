"""Recovery after pruning at once: one budget for all methods, rates chosen on validation, means that are paired."""

from __future__ import annotations

import json

import pytest

from benchmarks.jpqd import bars, recovery
from mptrain.recipe import Recipe

BETTER = {recovery.OURS: 3e-5}
"""methods that do best on validation with that rate; the others with the other one"""


def made() -> tuple[dict, list]:
    """All arms as a run of the benchmark makes them: curvature has three of four reviews right, the others two."""
    done, names = {}, []
    for arm in recovery.arms(done):
        method, kept, rate, seed = arm
        names.append((method, kept, seed))
        correct = "1110" if method == recovery.OURS else "1100"
        best = BETTER.get(method, 1e-4) == rate
        done[recovery.name_of(*arm)] = {"correct": correct, "validation": 0.8 + best, "steps": 278}
    return done, names


def test_the_first_seed_tries_all_rates_and_the_others_the_best():
    done, names = made()
    first, *others = recovery.SEEDS
    whole = len(recovery.METHODS) * len(recovery.KEPT)
    assert sum(seed == first for *_, seed in names) == whole * len(recovery.RATES)
    assert sum(seed in others for *_, seed in names) == whole * len(others) == len({n for n in names if n[-1] != first})
    for name in done:
        method, _, _, rate, seed = name.split("/")
        assert int(seed) == first or float(rate) == BETTER.get(method, 1e-4)


def test_rows_are_of_all_seeds_and_end_with_the_mean_of_the_smallest_sizes():
    done, _ = made()
    dense = dict.fromkeys(map(str, recovery.SEEDS), "1111")
    rows = recovery.summary(done, dense)
    assert len(rows) == len(recovery.METHODS) * (len(recovery.KEPT) + 1)
    for row in rows:
        ours = row["method"] == recovery.OURS
        assert row["test"] == pytest.approx(0.75 if ours else 0.5) and row["seeds"] == len(recovery.SEEDS)
        assert row["against_dense"][0] == pytest.approx(-0.25 if ours else -0.5)
        assert ours or row["curvature_ahead"][0] == pytest.approx(0.25)
    assert rows[-1]["keep"] is None and json.dumps(rows)
    missing = {name: value for name, value in done.items() if not name.startswith("fisher/0.15/1/")}
    left = recovery.summary(missing, dense)
    assert len(left) == len(rows) - 2 and recovery.summary(done, {"42": "1111"}) == []
    assert "| 25% | 278 | curvature | 3e-05 | 75.0% |" in recovery.table({"rows": rows, "host": {"cpu": "a CPU"}})


def test_an_arm_is_a_valid_recipe(tmp_path):
    (tmp_path / "dense").mkdir()
    for arm in recovery.arms(made()[0]):
        start = tmp_path / "small"
        described = recovery.recipe(arm, tmp_path / "dense", start, tmp_path, tmp_path / "run")
        (stage,) = Recipe.model_validate(described).stages
        assert stage.train.epochs == recovery.EPOCHS and stage.train.lr == arm[2] and stage.prune is None


def test_its_bars(tmp_path, monkeypatch):
    done, _ = made()
    rows = recovery.summary(done, dict.fromkeys(map(str, recovery.SEEDS), "1111"))
    (tmp_path / "recovery.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(bars, "RESULTS", tmp_path)
    found = {row["bar"]: row for row in bars.recovery()}
    assert len(found) == (len(recovery.KEPT) + 1) * (len(recovery.METHODS) - 1)
    assert found["curvature not behind fisher at 25%, after training"]["met"]
    assert found["curvature ahead of fisher in the mean of 25 and 15%, after training"]["value"] == pytest.approx(0.25)
