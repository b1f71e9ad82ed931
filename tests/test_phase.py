"""Which epoch a phase ends with."""

from types import SimpleNamespace

import numpy as np
import pytest

from mptrain.inputs.metrics import Score
from mptrain.train.phase import PhaseTrainer


def best_step(epochs, higher=True):
    """The step kept, of epochs given as (accuracy, loss)."""
    phase = SimpleNamespace(
        settings=SimpleNamespace(keep_best=True, patience=None),
        compressors=(),
        best=None,
        _bad_epochs=0,
        args=SimpleNamespace(should_save=False),
    )
    for step, values in enumerate(epochs, 1):
        phase.state = SimpleNamespace(global_step=step)
        rows = zip(("accuracy", "loss"), values, (higher, False))
        PhaseTrainer._keep_best(phase, [Score(n, np.array([[v]]), "mean", h) for n, v, h in rows])
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
