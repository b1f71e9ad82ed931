"""Which epoch a phase ends with, and what it says on the way."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.train.phase import PhaseTrainer
from mptrain.train.progress import TrainingProgress


def best_step(epochs, higher=True):
    """The step kept, of epochs given as (accuracy, loss)."""
    phase = SimpleNamespace(
        settings=SimpleNamespace(keep_best=True, patience=None),
        compressors=(),
        best=None,
        _bad_epochs=0,
        args=SimpleNamespace(should_save=False),
        folder=Path(),
        save_weights=lambda path: None,
    )
    for step, values in enumerate(epochs, 1):
        phase.state = SimpleNamespace(global_step=step)
        rows = zip(("accuracy", "loss"), values, (higher, False))
        PhaseTrainer._keep_best(phase, [Score(n, np.array([[v]]), MEAN, "number", h) for n, v, h in rows])
    return phase.best["step"]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([(0.8, 0.5), (0.9, 0.6), (0.85, 0.1)], 2),
        ([(0.9, 0.5), (0.9, 0.4), (0.9, 0.45)], 2),
        ([(0.9, 0.5), (0.9, 0.5)], 1),
    ],
    ids=["accuracy decides", "loss breaks a tie", "the first of equals"],
)
def test_best_epoch(epochs, expected):
    assert best_step(epochs) == expected


def test_a_metric_where_less_is_better():
    assert best_step([(3.0,), (2.0,), (2.5,)], higher=False) == 2


def test_progress_of_one_step_names_no_loss(caplog):
    """transformers logs the loss of a step after the step; until then there is none to show."""
    progress = TrainingProgress(SimpleNamespace(stage="dense", name="train", start=0))
    state = SimpleNamespace(global_step=0, max_steps=1)
    with caplog.at_level("INFO"):
        progress.on_train_begin(None, state, None)
        state.global_step = 1
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs={"loss": 0.5})
        progress.on_step_end(None, state, None)
        progress.close()
    first, second = (r.message for r in caplog.records)
    assert "loss" not in first and "step 1 of 1, loss 0.500," in second
