"""What was measured on the variants, as rows of the report: scores with intervals, and differences to the baseline.

Scores of all variants are of the same examples in the same order, so differences are paired.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mptrain.data.tasks.metrics import drop
from mptrain.measure.intervals import interval, paired_difference
from mptrain.report.row import Row

if TYPE_CHECKING:
    from mptrain.data.tasks.metrics import Score


@dataclass
class Variant:
    """One exported model and what was measured on it.

    `scores` come from the exported file itself, the main metric first; all variants are
    scored on the same examples in the same order. So are those of `multiple_choice`, by task.
    `path` is the model file, relative to the run folder.
    """

    id: str
    stage: str
    format: str
    precision: str
    path: str
    size_bytes: int
    params: int
    scores: list[Score]
    macs: int | None = None
    latency_ms: dict[str, dict[str, float | int]] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] | None = None
    multiple_choice: dict[str, list[Score]] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    throughput: dict[str, dict[str, float | int]] = field(default_factory=dict)
    """examples a second, by the settings of latency_ms"""
    unscored: str | None = None
    """why there are no scores, where its outputs are not finite"""


def measured(v: Variant) -> Row:
    return {
        "id": v.id,
        "stage": v.stage,
        "format": v.format,
        "precision": v.precision,
        "path": v.path,
        "metrics": {score.name: _score(score) for score in v.scores},
        "multiple_choice": {
            task: {score.name: _score(score) for score in scores} for task, scores in v.multiple_choice.items()
        },
        "size_bytes": v.size_bytes,
        "params": v.params,
        "macs": v.macs,
        "latency_ms": v.latency_ms,
        "generation": v.generation,
        "throughput": v.throughput,
        "runtime": v.runtime,
        "parity": v.parity,
        "unscored": v.unscored,
    }


def _score(score: Score) -> Row:
    return {"value": score.value, "unit": score.unit, "n": score.n, "ci95": list(interval(score))}


def metric(score: Score) -> Row:
    return {"name": score.name, "unit": score.unit, "higher_is_better": score.higher_is_better}


def compared(v: Variant, base: Variant) -> Row:
    score, reference = v.scores[0], base.scores[0]
    difference = paired_difference(score, reference)
    return {
        "id": v.id,
        "vs": base.id,
        "metric": score.name,
        "unit": score.unit,
        f"{score.name}_delta": difference.value,
        f"{score.name}_delta_ci95": [difference.low, difference.high],
        "verdict": difference.verdict(score.higher_is_better),
        "drop": drop(reference, score),
        "multiple_choice": {
            task: {
                score.name: _paired(score, other)
                for score, other in zip(scores, base.multiple_choice[task], strict=True)
            }
            for task, scores in v.multiple_choice.items()
        },
        "size_ratio": base.size_bytes / v.size_bytes,
        "params_ratio": base.params / v.params,
        "speedup": {
            key: base.latency_ms[key]["median"] / time["median"]
            for key, time in v.latency_ms.items()
            if key in base.latency_ms
        },
    }


def _paired(score: Score, reference: Score) -> Row:
    difference = paired_difference(score, reference)
    return {
        "delta": difference.value,
        "delta_ci95": [difference.low, difference.high],
        "verdict": difference.verdict(score.higher_is_better),
    }


def floor_row(name: str | None, floor: Score, baseline: Score | None) -> Row:
    """The floor with the baseline's lead over it, when both scored the same examples."""
    row: Row = {"name": name or "floor", "metrics": {floor.name: _score(floor)}, "lead": None}
    if baseline and (baseline.name, baseline.n) == (floor.name, floor.n):
        lead = paired_difference(baseline, floor)
        row["lead"] = {
            "value": lead.value,
            "ci95": [lead.low, lead.high],
            "verdict": lead.verdict(floor.higher_is_better),
        }
    return row
