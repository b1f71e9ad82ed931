"""The bars are what the result files say, and are met where they say so."""

from __future__ import annotations

import json

import pytest

from benchmarks.jpqd import bars


def test_the_committed_file_is_fresh():
    assert bars.load("jpqd_bars.json") == json.loads(json.dumps(bars.bars()))


@pytest.mark.parametrize(
    ("value", "interval", "met"),
    [
        (0.02, (0.01, 0.03), True),
        (0.02, (-0.01, 0.05), False),
        (0.02, (None, None), False),
        (None, (None, None), False),
    ],
)
def test_ahead_is_whose_whole_interval_is_above_zero(value, interval, met):
    assert bars.ahead("a", value, "file.json", interval)["met"] is met


@pytest.mark.parametrize(("value", "met"), [(0.02, True), (-0.009, True), (-0.011, False), (None, False)])
def test_a_loss_is_met_by_its_value(value, met):
    assert bars.at_least("a", value, -0.01, "file.json", (-0.05, 0.05))["met"] is met


def test_what_was_not_measured_is_not_met(tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "RESULTS", tmp_path)
    rows = bars.bars()["rows"]
    assert len(rows) > 30 and not any(row["met"] for row in rows) and {row["value"] for row in rows} == {None}


def test_a_missed_budget_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "RESULTS", tmp_path)
    found = {"rows": [{"name": "fp32, 0.5", "ratio": 0.51}, {"name": "int8, 0.5", "ratio": 0.56}]}
    (tmp_path / "latency_budget.json").write_text(json.dumps(found))
    rows = {row["bar"]: row for row in bars.bars()["rows"]}
    assert rows["latency of 0.5 asked for in fp32, missed by"]["met"]
    missed = rows["latency of 0.5 asked for in int8, missed by"]
    assert missed["value"] == pytest.approx(0.12) and not missed["met"]
