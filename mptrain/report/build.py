"""report.json: every number of a run, in one file. All other reports are rendered from it.

Keys are listed in `build`. Numbers are finite or null, ratios are baseline/variant,
differences variant − baseline, fractions are fractions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.recipe import Recipe
from mptrain.report import gates, recommend
from mptrain.report import notes as cautions
from mptrain.report.row import Row
from mptrain.report.scores import Variant, compared, floor_row, measured, metric
from mptrain.report.upgrade import about

if TYPE_CHECKING:
    from mptrain.data.tasks.metrics import Score

__all__ = ["SCHEMA", "Variant", "build"]

SCHEMA = "mptrain.report/v1"


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
    wall_s, variants, baseline, comparisons (one per other variant that is scored), floor, methods (by stage: words,
    tags, facts), structure, compressed, gates, recommendation, data, multiple_choice (facts by task; scores and
    differences are with the variants and comparisons), training (optimizer steps per stage), history, checkpoints,
    on_hub (whether model and data names are names on the Hugging Face hub), notes.

    Args:
        floor: score of the task's floor on the same test examples as the variants.
        history: training log rows {"stage", "phase", "step", "loss", ...}; step counts optimizer
            steps from the start of the stage.
        methods: facts of the methods of each stage, by the field of the stage. Two of them have tables:
            `structure`, what `compress.structure.costs.describe` says, of the last stage that has it; `compressed`,
            rows of `records.describe`: the weights that are integers or table entries.
        checkpoints: folders that `mptrain.load` reads, by stage, relative to the run folder.
    """
    base = _baseline(recipe, variants)
    rows = _finite([measured(v) for v in variants])
    comparisons = _finite([compared(v, base) for v in variants if base is not None and v is not base and v.scores])
    structure = _structure(methods or {})
    report: Row = {
        **_asked(recipe),
        "metric": metric(base.scores[0]) if base else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host,
        "versions": versions,
        "wall_s": wall_s,
        "variants": rows,
        "baseline": base.id if base else None,
        "comparisons": comparisons,
        "floor": floor_row(recipe.model.kind.floor, floor, base.scores[0] if base else None) if floor else None,
        "methods": _methods(recipe, methods or {}),
        "structure": structure,
        "compressed": _compressed(methods or {}),
        "gates": gates.check(recipe.gates, rows, comparisons, len(structure["layers"]) if structure else None),
        "recommendation": _recommendation(recipe, base, rows, comparisons, host),
        "data": data_facts or {},
        "multiple_choice": multiple_choice or {},
        "training": _training(recipe, history),
        "history": history,
        "checkpoints": checkpoints or {},
        "notes": [*notes, *cautions.notes(recipe, rows, base.id if base else None, data_facts or {}, methods or {})],
    }
    return _finite(report)


def _asked(recipe: Recipe) -> Row:
    """What the recipe says of itself."""
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "task": recipe.model.task,
        "about_task": about(recipe.model.kind),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "on_hub": {
            "model": _on_hub(recipe.model.path) and recipe.model.module is None,
            "data": _on_hub(recipe.data.source),
        },
    }


def _baseline(recipe: Recipe, variants: Sequence[Variant]) -> Variant | None:
    scored = [v for v in variants if v.scores]
    base = next((v for v in scored if v.id == "baseline_fp32"), None)
    return base or next((v for v in scored if v.stage == recipe.baseline), scored[0] if scored else None)


def _recommendation(
    recipe: Recipe, base: Variant | None, rows: Sequence[Row], comparisons: Sequence[Row], host: Mapping[str, Any]
) -> Row | None:
    if base is None:
        return None
    return recommend.recommend(
        recipe.model.kind.unit,
        base.scores[0].unit,
        next(row for row in rows if row["id"] == base.id),
        rows,
        comparisons,
        dict(host),
        max_drop=recipe.gates.max_drop,
        setting=next(iter(recipe.gates.min_speedup), None),
    )


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
