"""Runs side by side: differences only where test rows are the same, the front, what differs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit import report_sample as sample

from mptrain.cli import main
from mptrain.commands.compare import runs_of
from mptrain.core.disk import write_json
from mptrain.report.compare import compare
from mptrain.report.render.compare import markdown, page

HOSTILE = "<script>alert(1)</script> | `a` {{7*7}}"


def save(folder: Path, scores: bool = True, test_hash: str | None = "rows", **changes: Any) -> Path:
    """A finished run of the sample, with what its variants' examples contributed."""
    variants = changes.setdefault("variants", sample.variants())
    report = sample.report(**changes)
    if test_hash is not None:
        report["data"]["test_hash"] = test_hash
    write_json(folder / "report.json", report)
    for variant in variants if scores else ():
        write_json(folder / "export" / f"{variant.id}.json", {"scores": [s.kept() for s in variant.scores]})
    return folder


def slower(seed: int = 5) -> list[Any]:
    """The sample's variants but its smallest, all slower and a little worse than there."""
    found = sample.variants(1.2)[:3]
    for number, variant in enumerate(found):
        if number:
            variant.scores = [sample.score(0.5, seed + number, found[0].scores[0], disagree=0.2)]
            variant.latency_ms = sample.times(1.1, seed)
    return found


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in found["rows"]}


def test_differences_are_those_of_the_report(tmp_path):
    (run,) = runs_of([str(save(tmp_path / "a"))])
    found = compare([run])
    ours = {row["variant"]: row for row in found["rows"] if row["id"] != found["reference"]}
    assert found["reference"] == "a:baseline_fp32" and len(ours) == 3 and not found["notes"]
    for theirs in run.report["comparisons"]:
        row = ours[theirs["id"]]
        assert row["difference"]["delta"] == pytest.approx(theirs["accuracy_delta"])
        assert row["difference"]["ci95"] == pytest.approx(theirs["accuracy_delta_ci95"])
        assert row["difference"]["verdict"] == theirs["verdict"]
        assert row["size_ratio"] == theirs["size_ratio"] and row["speedup"] == theirs["speedup"][found["setting"]]


def test_a_copied_report_alone_keeps_the_differences_to_its_own_baseline(tmp_path):
    found = rows(compare(runs_of([str(save(tmp_path / "a", scores=False))])))
    assert all(row["difference"] for name, row in found.items() if name != "a:baseline_fp32")
    other = compare(runs_of([str(tmp_path / "a")]), reference="a:pruned_fp32")
    assert all("not kept" in row["unpaired"] for row in other["rows"] if row["id"] != "a:pruned_fp32")


def test_across_runs_the_same_rows_are_paired_and_others_are_said_to_be_unpaired(tmp_path):
    same, other = save(tmp_path / "same", variants=slower()), save(tmp_path / "other", test_hash="others")
    gone, old = save(tmp_path / "gone", scores=False), save(tmp_path / "old", test_hash=None)
    found = compare(runs_of(map(str, (save(tmp_path / "a"), same, other, gone, old))))
    by_id = rows(found)
    assert by_id["same:jpqd_int8"]["difference"]["verdict"] == "worse"
    assert by_id["other:jpqd_int8"]["difference"] is None and by_id["other:jpqd_int8"]["on_front"] is None
    assert by_id["other:jpqd_int8"]["unpaired"] == "other test rows"
    assert "are not kept" in by_id["gone:jpqd_int8"]["unpaired"]
    assert "not known" in by_id["old:jpqd_int8"]["unpaired"]
    assert any("other test rows" in note and "other:jpqd_int8" in note for note in found["notes"])
    assert "not paired" in markdown(found) and "not paired" in page(found)


def test_baselines_that_are_the_reference_again_are_left_out(tmp_path):
    found = compare(runs_of([str(save(tmp_path / name)) for name in "ab"]))
    assert set(found["alike"]) == {"b:baseline_fp32"} and "b:baseline_fp32" not in rows(found)
    assert "b:jpqd_int8" in rows(found)


def test_the_front_holds_what_no_other_beats(tmp_path):
    found = compare(runs_of([str(save(tmp_path / "a")), str(save(tmp_path / "b", variants=slower()))]))
    front = {name for name, row in rows(found).items() if row["on_front"]}
    assert "a:jpqd_int8_emb4" in front
    assert "b:jpqd_int8" not in front and "b:pruned_fp32" not in front

    def beats(one, other):
        def cost(row):
            return (
                row["size_bytes"],
                row["latency_ms"][found["setting"]]["median"],
                -row["metrics"]["accuracy"]["value"],
            )

        return cost(one) != cost(other) and all(a <= b for a, b in zip(cost(one), cost(other)))

    for name, row in rows(found).items():
        assert (name in front) == (not any(beats(other, row) for other in found["rows"]))


def test_times_of_other_processors_are_not_compared(tmp_path):
    found = compare(runs_of([str(save(tmp_path / "a")), str(save(tmp_path / "b", host={**sample.host(), "cpu": "X"}))]))
    assert rows(found)["b:jpqd_int8"]["speedup"] is None and rows(found)["a:jpqd_int8"]["speedup"]
    assert any("different processors" in note for note in found["notes"])


def test_what_differs_is_named_by_the_field(tmp_path):
    content = sample.recipe().model_dump(mode="json", by_alias=True)
    content["stages"][1]["train"]["lr"] = 5e-5
    content["stages"][1]["quantize"] = None
    changed = sample.recipe(**{key: content[key] for key in ("stages",)} | {"export": [
        {"id": "ov", "format": "openvino", "of": ["dense", "jpqd"], "precision": ["fp32"]}]})  # fmt: skip
    found = compare(runs_of([str(save(tmp_path / "a")), str(save(tmp_path / "b", recipe=changed))]))
    fields = {row["field"]: row["values"] for row in found["differs"]}
    assert fields["stages.jpqd.train.lr"] == {"a": "2e-05", "b": "5e-05"}
    assert fields["stages.jpqd.quantize"]["b"] == "–" and "qat" in fields["stages.jpqd.quantize"]["a"]
    assert "export.ov.precision" in fields and "name" not in fields


def test_a_reference_and_a_variant_may_be_chosen(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", variants=slower())
    found = compare(runs_of([f"{a}:jpqd_int8", str(b)]), reference="b:pruned_fp32", setting="b8_s32_t1")
    assert found["reference"] == "b:pruned_fp32" and [r["id"] for r in found["rows"] if r["run"] == "a"] == [
        "a:jpqd_int8"
    ]
    assert found["setting"] == "b8_s32_t1"


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = runs_of([str(save(tmp_path / "x" / "run")), str(save(tmp_path / "y" / "run"))])
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_the_page_shows_strings_as_text(tmp_path):
    folder = save(tmp_path / "a", notes=[HOSTILE])
    report = json.loads((folder / "report.json").read_text())
    report["host"]["cpu"] = HOSTILE
    report["recipe"]["seed"] = HOSTILE
    write_json(tmp_path / "b" / "report.json", report)
    text = page(compare(runs_of([str(folder), str(tmp_path / "b")])))
    assert "<script>" not in text and "&lt;script&gt;" in text and "<svg" in text


def test_the_command_writes_the_pages_and_a_sweep_is_its_points(tmp_path, capsys):
    for name in "ab":
        save(tmp_path / "sweep" / name, variants=sample.variants() if name == "a" else slower())
    write_json(tmp_path / "sweep" / "sweep.json", {"points": [{"folder": "a"}, {"folder": "b"}]})
    assert main(["compare", str(tmp_path / "sweep"), "--to", str(tmp_path / "out")]) == 0
    assert "b" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "comparison.html", "comparison.json", "comparison.md",
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "nothing"], "there is no report"),
        (["a", "schema"], "its schema is 'other/v1'"),
        (["a", "task"], "the task of"),
        (["a:none"], "there is no variant none; its variants are baseline_fp32"),
        (["a", "a"], "is given twice"),
        (["a", "a:jpqd_int8"], "is given twice"),
        (["a", "--setting", "b9"], "--setting b9: not all that was timed"),
        (["a", "--reference", "b:x"], "--reference b:x: it is none of what is compared"),
        (["damaged"], "not a readable report"),
        (["sweep"], "not the file of a sweep"),
    ],
)
def test_bad_input_is_one_paragraph(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "a")
    report = json.loads((folder / "report.json").read_text())
    (tmp_path / "nothing").mkdir()
    write_json(tmp_path / "schema" / "report.json", {**report, "schema": "other/v1"})
    write_json(tmp_path / "task" / "report.json", {**report, "task": "regression"})
    write_json(tmp_path / "sweep" / "sweep.json", [1])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    assert main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.strip().splitlines()) == 2  # the paragraph, and where to read on
    assert not (tmp_path / "comparison").exists()
