"""report.json: every number of a run, in one file. All other reports are rendered from it.

Keys are listed in `build`. Numbers are finite or null, ratios are baseline/variant,
differences variant − baseline, fractions are fractions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.measure.intervals import interval, paired_difference
from mptrain.recipe import EXPORTS, Recipe, plan
from mptrain.recipe.exports import spec_of
from mptrain.report import gates, recommend
from mptrain.report.upgrade import about

if TYPE_CHECKING:
    from mptrain.data.tasks.metrics import Score

SCHEMA = "mptrain.report/v1"
Row = dict[str, Any]


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


def build(
    recipe: Recipe,
    *,
    versions: Mapping[str, str],
    host: Mapping[str, Any],
    wall_s: Mapping[str, float],
    variants: Sequence[Variant],
    floor: Score | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    methods: Mapping[str, Mapping[str, Row]] | None = None,
    data_facts: Mapping[str, Any] | None = None,
    multiple_choice: Mapping[str, Mapping[str, Any]] | None = None,
    checkpoints: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Row:
    """The report as JSON data: plain types, no NaN or infinity (they become null).

    The baseline is `baseline_fp32`, else the first variant of `recipe.baseline`, else the first variant.
    Keys: schema, name, task, about_task (what its row of TASKS says), metric, created, host, versions, recipe,
    wall_s, variants, baseline, comparisons (one per other variant), floor, methods (by stage: words, tags, facts),
    structure, compressed, gates,
    recommendation, data,
    multiple_choice (facts by task; scores and differences are with the variants and comparisons), training
    (optimizer steps per stage), history, checkpoints, on_hub (whether model and
    data names are names on the Hugging Face hub), notes.

    Args:
        floor: score of the task's floor on the same test examples as the variants.
        history: training log rows {"stage", "phase", "step", "loss", ...}; step counts optimizer
            steps from the start of the stage.
        methods: facts of the methods of each stage, by the field of the stage. Two of them have tables:
            `structure`, what `compress.structure.costs.describe` says, of the last stage that has it; `compressed`,
            rows of `records.describe`: the weights that are integers or table entries.
        checkpoints: folders that `mptrain.load` reads, by stage, relative to the run folder.
    """
    base = next((v for v in variants if v.id == "baseline_fp32"), None)
    base = base or next((v for v in variants if v.stage == recipe.baseline), variants[0] if variants else None)
    facts = methods or {}
    structure, compressed = _structure(facts), _compressed(facts)
    rows = _finite([_variant(v) for v in variants])
    comparisons = _finite([_compare(v, base) for v in variants if base is not None and v is not base])
    report: Row = {
        "schema": SCHEMA,
        "name": recipe.name,
        "task": recipe.model.task,
        "about_task": about(recipe.model.kind),
        "metric": _metric(base.scores[0]) if base else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host,
        "versions": versions,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "wall_s": wall_s,
        "variants": rows,
        "baseline": base.id if base else None,
        "comparisons": comparisons,
        "floor": _floor(recipe.model.kind.floor, floor, base.scores[0] if base else None) if floor else None,
        "methods": _methods(recipe, facts),
        "structure": structure,
        "compressed": compressed,
        "gates": gates.check(recipe.gates, rows, comparisons, len(structure["layers"]) if structure else None),
        "recommendation": None,
        "data": data_facts or {},
        "multiple_choice": multiple_choice or {},
        "training": _training(recipe, history),
        "history": history,
        "checkpoints": checkpoints or {},
        "on_hub": {"model": _on_hub(recipe.model.path), "data": _on_hub(recipe.data.source)},
        "notes": [
            *notes,
            *_unlearned(rows, base.id if base else "", data_facts or {}),
            *_unchecked(recipe, rows),
            *_expanded(recipe, compressed, rows),
        ],
    }
    if base:
        report["recommendation"] = recommend.recommend(
            recipe.model.kind.unit,
            base.scores[0].unit,
            next(row for row in rows if row["id"] == base.id),
            rows,
            comparisons,
            dict(host),
            max_drop=recipe.gates.max_drop,
            setting=next(iter(recipe.gates.min_speedup), None),
        )
    return _finite(report)


def _training(recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Steps of each trained stage, and `total_steps` with those of the stages it started from."""
    steps: dict[str, int] = {}
    for row in history:
        steps[row["stage"]] = max(row["step"], steps.get(row["stage"], 0))
    totals = {"model": 0}
    for stage in recipe.stages:
        totals[stage.id] = totals[recipe.start_of(stage)] + steps.get(stage.id, 0)
    return [
        {"stage": stage.id, "from": recipe.start_of(stage), "steps": steps[stage.id], "total_steps": totals[stage.id]}
        for stage in recipe.stages
        if stage.id in steps
    ]


def _methods(recipe: Recipe, facts: Mapping[str, Mapping[str, Row]]) -> Row:
    """What each stage does in words, as tags of a card, and what it did, but for what has a place of its own."""
    shown = ("structure", "compressed")
    return {
        stage.id: {
            "words": stage.words(),
            "tags": stage.tags(),
            "facts": {
                field: {name: value for name, value in found.items() if name not in shown}
                for field, found in facts.get(stage.id, {}).items()
            },
        }
        for stage in recipe.stages
    }


def _structure(facts: Mapping[str, Mapping[str, Row]]) -> Row | None:
    found = [{"stage": s, **f["structure"]} for s, of in facts.items() for f in of.values() if f.get("structure")]
    return found[-1] if found else None


def _compressed(facts: Mapping[str, Mapping[str, Row]]) -> dict[str, list[Row]]:
    found = {stage: [row for f in of.values() for row in f.get("compressed", ())] for stage, of in facts.items()}
    return {stage: rows for stage, rows in found.items() if rows}


def _variant(v: Variant) -> Row:
    return {
        "id": v.id,
        "stage": v.stage,
        "format": v.format,
        "precision": v.precision,
        "path": v.path,
        "metrics": {score.name: _measured(score) for score in v.scores},
        "multiple_choice": {
            task: {score.name: _measured(score) for score in scores} for task, scores in v.multiple_choice.items()
        },
        "size_bytes": v.size_bytes,
        "params": v.params,
        "macs": v.macs,
        "latency_ms": v.latency_ms,
        "runtime": v.runtime,
        "parity": v.parity,
    }


def _measured(score: Score) -> Row:
    return {"value": score.value, "unit": score.unit, "n": score.n, "ci95": list(interval(score))}


def _metric(score: Score) -> Row:
    return {"name": score.name, "unit": score.unit, "higher_is_better": score.higher_is_better}


def _compare(v: Variant, base: Variant) -> Row:
    score, reference = v.scores[0], base.scores[0]
    difference = paired_difference(score, reference)
    lost = -difference.value if score.higher_is_better else difference.value
    if score.unit == "number":  # relative: its scale has no meaning of its own
        lost = lost / abs(reference.value) if reference.value else math.nan
    return {
        "id": v.id,
        "vs": base.id,
        "metric": score.name,
        "unit": score.unit,
        f"{score.name}_delta": difference.value,
        f"{score.name}_delta_ci95": [difference.low, difference.high],
        "verdict": difference.verdict(score.higher_is_better),
        "drop": lost,
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


def _floor(name: str | None, floor: Score, baseline: Score | None) -> Row:
    """The floor with the baseline's lead over it, when both scored the same examples."""
    row: Row = {"name": name or "floor", "metrics": {floor.name: _measured(floor)}, "lead": None}
    if baseline and (baseline.name, baseline.n) == (floor.name, floor.n):
        lead = paired_difference(baseline, floor)
        row["lead"] = {
            "value": lead.value,
            "ci95": [lead.low, lead.high],
            "verdict": lead.verdict(floor.higher_is_better),
        }
    return row


def _unlearned(variants: Sequence[Row], baseline: str, data_facts: Mapping[str, Any]) -> list[str]:
    """A baseline that is no better than its commonest answer: what is near it says nothing."""
    counts = data_facts.get("labels", {}).get("test", {})
    accuracy = next((v["metrics"].get("accuracy") for v in variants if v["id"] == baseline), None)
    if not counts or accuracy is None or accuracy["value"] is None:
        return []
    label, count = max(counts.items(), key=lambda item: item[1])
    share = count / sum(counts.values())
    if accuracy["value"] > share:
        return []
    return [
        f"{baseline} is right on {100 * accuracy['value']:.1f}% of the test split, and whoever always answers {label!r}"
        f" on {100 * share:.1f}%: it has learned nothing, so nothing follows from the differences to it."
    ]


def _unchecked(recipe: Recipe, variants: Sequence[Row]) -> list[str]:
    """Gates that had nothing to check."""
    notes = []
    if recipe.gates.parity is not None and not any(map(gates.exact, variants)):
        notes.append("The parity gate was not checked: no fp32 variant was exported (an fp16 cache does not count).")
    if recipe.gates.fused_attention is not None and not any(
        "fused_attention" in spec_of(v["format"]).checks for v in variants
    ):
        able = " or ".join(spec.title for spec in EXPORTS.values() if "fused_attention" in spec.checks)
        notes.append(f"The fused-attention gate was not checked: no {able} variant was exported.")
    return notes


def _expanded(recipe: Recipe, compressed: Mapping[str, Sequence[Row]], variants: Sequence[Row]) -> list[str]:
    """Variants whose format has no place for the tables of a stage."""
    tables = {stage for stage, rows in compressed.items() if any("table" in row["how"] for row in rows)}
    exports = {planned.id: planned.export for planned in plan.variants(recipe)}
    found: dict[str, list[str]] = {}
    for v in variants:
        export = exports.get(v["id"])
        if v["stage"] in tables and export is not None and export.expands(recipe.stage(v["stage"])):
            found.setdefault(export.title, []).append(v["id"])
    return [
        f"{title} has no look-up tables: the palettized weights of {', '.join(ids)} are written out as fp32 numbers."
        " They score as the tables do, but the file is not smaller; the table Compressed weights has the stored size."
        for title, ids in found.items()
    ]


def _on_hub(name: str | None) -> bool:
    """Whether a model or data name means the hub: it has the form, and no local folder has it."""
    if name is None or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        return False
    return not Path(name).exists()


def _finite(value: Any) -> Any:
    """A copy in plain JSON types; numbers that JSON does not know become None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
