"""docs/extend.md to the letter: its files are written into an empty folder, and its recipes run."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import tiny

import mptrain

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


def run(folder: Path, *command: str) -> str:
    """In a process of its own, for what is registered there must not reach other tests."""
    here = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return done.stdout


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_file_has_at_most_80_lines():
    assert {"my_task.py", "my_model.py"} <= set(FILES)
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
