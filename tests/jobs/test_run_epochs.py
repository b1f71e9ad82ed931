"""A run that is stopped at the end of an epoch, where the checkpoint and the evaluation meet."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from kit import tiny
from kit.jobs import differences, kill_at, metrics, run

INTERRUPTED = """
import os, signal, sys
from mptrain.cli import main
from mptrain.train.phase import PhaseTrainer

def load_best(self, after=PhaseTrainer.load_best):
    os.kill(os.getpid(), signal.SIGINT)
    after(self)

PhaseTrainer.load_best = load_best
sys.exit(main(["recipe", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(function that writes the recipe of some epochs, the metrics of an uninterrupted run of three)."""
    folder = tmp_path_factory.mktemp("dense")

    def recipe(output, epochs):
        described = tiny.jpqd(folder)
        described["stages"] = described["stages"][:1]
        # 18 steps to an epoch, and a learning rate at which the last epoch is not the best
        described["stages"][0]["train"] |= {"epochs": epochs, "lr": 1e-2, "checkpoint_steps": 18}
        described["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
        described["output"]["dir"] = str(output)
        return tiny.write(described, output.with_suffix(".yaml"))

    run(recipe(folder / "run", 3))
    return recipe, metrics(folder / "run")


def test_a_run_killed_at_the_end_of_an_epoch_continues_to_the_same_numbers(dense, tmp_path):
    recipe, expected = dense
    path = recipe(tmp_path / "run", 3)
    assert kill_at(path, tmp_path / "run", "stages/dense/0-train/checkpoint-36/manifest.json") == -signal.SIGKILL
    run(path)
    assert not differences(metrics(tmp_path / "run"), expected)


@pytest.mark.long
def test_ctrl_c_in_the_last_evaluation_stops_before_the_export(dense, tmp_path):
    recipe, _ = dense
    path = recipe(tmp_path / "run", 1)
    assert subprocess.run([sys.executable, "-c", INTERRUPTED, str(path)]).returncode == 130
    assert not list((tmp_path / "run").glob("export/*"))
    run(path)
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.long
def test_a_run_that_stops_early_is_resumed_to_the_same_end(tmp_path):
    def recipe(output):
        described = tiny.jpqd(tmp_path)
        described["stages"] = described["stages"][:1]
        settings = {"epochs": 12, "lr": 2e-2, "checkpoint_steps": 5, "patience": 2}
        described["stages"][0]["train"] |= settings
        described["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
        described["output"]["dir"] = str(output)
        return tiny.write(described, output.with_suffix(".yaml"))

    run(recipe(tmp_path / "whole"))
    expected = metrics(tmp_path / "whole")
    last = max(row["step"] for row in expected["history"])
    assert last < 12 * 18, "it stopped early"
    newest = (last - 1) // 5 * 5
    path = recipe(tmp_path / "run")
    checkpoint = f"stages/dense/0-train/checkpoint-{newest}/manifest.json"
    assert kill_at(path, tmp_path / "run", checkpoint) == -signal.SIGKILL
    run(path)
    assert not differences(metrics(tmp_path / "run"), expected)
