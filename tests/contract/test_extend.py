"""docs/extend.md to the letter: its files are written into an empty folder, and its recipes run."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from kit import tiny
from kit.processes import python

import mptrain
from mptrain import recipe
from mptrain.compress.weights import records
from mptrain.core.errors import UserError
from mptrain.extend import register_method

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"
FILES = dict(
    re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)


def save_ratings(path: Path, rows: int = 160) -> None:
    """Texts of random words; the rating is the share of good ones less that of bad ones."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "rating"])
        for _ in range(rows):
            words = [draw.choice(tiny.WORDS) for _ in range(draw.randint(4, 14))]
            good, bad = (sum(word in kind for word in words) for kind in (tiny.POSITIVE, tiny.NEGATIVE))
            writer.writerow([" ".join(words), (good - bad) / len(words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (found / name).write_text(text, encoding="utf-8")
    tiny.save_bert(found / "bert")
    tiny.save_reviews(found / "reviews.csv")
    save_ratings(found / "ratings.csv")
    return found


def run(folder: Path, *command: str, status: int = 0) -> str:
    """In a process of its own, for what is registered there must not reach other tests."""
    done = python(*command, cwd=folder, output=folder)
    assert done.status == status, done.stdout[-1500:] + done.stderr[-4000:]
    return done.stderr if status else done.stdout


def refused(folder: Path, *command: str) -> str:
    return run(folder, *command, status=2)


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_file_has_at_most_80_lines():
    assert {"my_task.py", "my_method.py", "my_model.py", "my_format.py"} <= set(FILES)
    assert not [name for name, text in FILES.items() if len([line for line in text.splitlines() if line.strip()]) > 80]


def test_a_task_of_ones_own(folder):
    shown = run(folder, "run_task.py")
    found = report(folder / "runs" / "task")
    (dense,) = found["variants"]
    assert found["metric"]["name"] == "pearson" and found["metric"]["unit"] == "coefficient"
    assert dense["metrics"]["pearson"]["value"] > 0.6, "it has learnt"
    assert dense["metrics"]["error"]["value"] < 0.5 and dense["parity"]["agreement"] > 0.99
    assert "Report:" in shown and "Pearson" in (folder / "runs/task/report.md").read_text(encoding="utf-8")
    assert (folder / "runs/task/README.md").is_file()


def test_a_method_of_ones_own(folder):
    planned = run(folder, "run_method.py", "--dry-run")
    assert "ternary weights" in planned and "small_compressed" in planned
    shown = run(folder, "run_method.py")
    found = report(folder / "runs" / "method")
    dense, small = found["variants"]
    assert [v["id"] for v in (dense, small)] == ["baseline_fp32", "small_compressed"]
    assert small["metrics"]["accuracy"]["value"] > 0.6 and small["parity"]["agreement"] > 0.99
    rows = found["compressed"]["small"]
    assert {row["bits"] for row in rows} <= {2, 2.5, 3} and len({row["weight"] for row in rows}) == 13
    held = records.of(mptrain.load(folder / "runs/method/stages/small/0-quantize/model"))
    assert len(held) == len(rows) == 13 and "classifier.weight" not in held
    assert {int(q) for record in held.values() for q in record.q.unique()} == {-1, 0, 1}
    # who opens the report later need not know the method
    assert "ternary weights" in (folder / "runs/method/README.md").read_text(encoding="utf-8")
    assert "Report:" in shown and "Report:" in run(folder, "-m", "mptrain", "report", "runs/method")


def test_a_method_that_an_export_cannot_hold_is_refused_before_training(folder):
    older = FILES["method.yaml"].replace("openvino", "coreml, minimum_deployment_target: iOS17")
    (folder / "ml.yaml").write_text(older.replace("[fp32, compressed]", "[fp32]"))
    main = "import sys, my_method; from mptrain.cli import main; sys.exit(main(['recipe', 'ml.yaml', *sys.argv[1:]]))"
    for options in ((), ("--dry-run",)):
        said = refused(folder, "-c", main, *options)
        assert "stages.small.quantize.mode: export.ov cannot hold it: needs minimum_deployment_target iOS18" in said
    (folder / "ml.yaml").write_text(FILES["method.yaml"].replace("[classifier]", "[nowhere]"))
    assert "stages.small.quantize.ignore: 'nowhere' matches no module" in refused(folder, "-c", main)


def test_an_unknown_method_is_answered_with_those_that_there_are(folder):
    said = refused(folder, "-m", "mptrain", "recipe", "method.yaml")
    assert "stages.small.quantize.mode: must be one of 'qat', 'ptq', 'weight_only', got 'ternary'" in said


def test_a_name_that_is_taken_is_refused():
    class Other(recipe.QuantizeConfig):
        mode: Literal["qat"]

    with pytest.raises(UserError, match="the name 'qat' of quantize is that of Qat; give another"):
        register_method(Other, "nowhere:Other")
    assert recipe.METHODS["quantize"]["qat"] is recipe.Qat


def test_a_structure_of_ones_own(folder):
    run(folder, "make_model.py")
    run(folder, "-m", "mptrain", "recipe", "structure.yaml", "--allow-code")
    found = report(folder / "runs" / "structure")
    dense, pruned = found["variants"]
    assert pruned["metrics"]["accuracy"]["value"] > 0.6
    model = mptrain.load(folder / "runs/structure/stages/small/1-finetune/model", allow_code=True)
    widths = [layer.up.out_features for layer in model.layers]
    assert sum(widths) == pytest.approx(64, abs=16) and all(
        layer.gate.out_features == n for layer, n in zip(model.layers, widths)
    )
    assert [layer.down.in_features for layer in model.layers] == widths
    batch = {"input_ids": torch.randint(5, 20, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert model(**batch).logits.shape == (2, 2) and pruned["size_bytes"] < dense["size_bytes"]


def test_a_format_of_ones_own(folder):
    run(folder, "make_linear.py")
    run(folder, "run_format.py")
    found = report(folder / "runs" / "format")
    exact, half = found["variants"]
    assert exact["format"] == "npz" and exact["metrics"]["accuracy"]["value"] > 0.6, "it has learnt"
    assert exact["runtime"]["weight_types"]["float32"] == 2 * half["runtime"]["weight_types"]["float16"]
    assert exact["parity"]["max_abs_diff"] < 1e-4 < half["parity"]["max_abs_diff"] + 1e-4
    assert {gate["name"] for gate in found["gates"]} >= {"parity", "agreement"} and exact["latency_ms"]
    arrays = np.load(folder / "runs/format" / exact["path"])
    assert arrays["weight"].shape[0] == 2
    card = (folder / "runs/format/README.md").read_text(encoding="utf-8")
    assert "library_name: numpy" in card and "numpy.load(" in card
