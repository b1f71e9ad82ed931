"""What a training says while it runs, as rows of the report."""

from __future__ import annotations

import math
from typing import Any

from mptrain.recipe.plan import Phase


def history_rows(log_history: list[dict[str, Any]], phase: Phase) -> list[dict[str, Any]]:
    """Trainer log entries as report rows: the step counts from the start of the stage."""
    renamed = {"learning_rate": "lr"}
    rows = []
    for entry in log_history:
        if "train_loss" in entry:
            continue
        row: dict[str, Any] = {"stage": phase.stage, "phase": phase.name, "step": phase.start + entry["step"]}
        for key, value in entry.items():
            # the gradient norm of a step that was skipped is not finite, and JSON has no such numbers
            if key in ("step", "epoch") or not math.isfinite(value):
                continue
            key = renamed.get(key, key)
            row[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else key] = value
        rows.append(row)
    return rows
