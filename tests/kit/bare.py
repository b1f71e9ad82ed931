"""A recipe of one stage on files that are not there: to read and to plan, not to run."""

from __future__ import annotations

import copy
from typing import Any

from mptrain.recipe import Recipe, file

TRAIN = {"epochs": 2, "lr": 0.1}


def recipe(*stages: dict[str, Any], **changes: Any) -> Recipe:
    """With these stages after the stage `a`."""
    described = {
        "schema": "mptrain/v1",
        "name": "x",
        "model": {"path": "m", "task": "text-classification"},
        "data": {"train": "t.csv"},
        "stages": [{"id": "a", "train": TRAIN}, *stages],
        "output": {"dir": "runs/x"},
    }
    return file.validate(copy.deepcopy(described | changes), "x")
