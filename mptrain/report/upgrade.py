"""Reports of before, as reports are now: what a task and its scores say of themselves was known by name then."""

from __future__ import annotations

from pydantic import ValidationError

from mptrain.recipe import METHODS, TASKS, Stage
from mptrain.recipe.task import TaskSpec
from mptrain.report.row import Row

_FRACTIONS = ("accuracy", "f1", "exact_match", "acc", "acc_norm")


def about(kind: TaskSpec) -> Row:
    """What a report says of its task, so that it can be rendered where the task is not known."""
    names = ("tag", "pipeline", "call", "optimum", "processor", "unit", "cuts", "floor")
    return {name: getattr(kind, name) for name in names}


def upgraded(report: Row) -> Row:
    """The report with `methods`, `about_task`, `unit` beside every score and `agreement`; changed in place."""
    if "methods" not in report:
        report["methods"] = {stage["id"]: _methods(stage) for stage in report["recipe"]["stages"]}
    if "about_task" in report:
        return report
    kind = TASKS.get(report["task"])
    report["about_task"] = about(kind) if kind else {"tag": report["task"], "unit": "tokens"}
    if report["metric"]:
        report["metric"]["unit"] = _unit(report["metric"]["name"])
    for variant in report["variants"]:
        for name, row in variant["metrics"].items():
            row["unit"] = _unit(name)
        for scores in (variant.get("multiple_choice") or {}).values():
            for name, row in scores.items():
                row["unit"] = _unit(name)
        if variant["parity"] and "argmax_agreement" in variant["parity"]:
            variant["parity"]["agreement"] = variant["parity"].pop("argmax_agreement")
    for comparison in report["comparisons"]:
        comparison["unit"] = _unit(comparison["metric"])
    if report.get("floor"):
        for name, row in report["floor"]["metrics"].items():
            row["unit"] = _unit(name)
    return report


def _methods(stage: Row) -> Row:
    """What a stage did, from its part of the recipe, also where its methods are not known here."""
    try:
        known = Stage.model_validate(stage)
    except ValidationError:
        given = {field: settings for field in METHODS if isinstance(settings := stage.get(field), dict)}
        words = [" ".join([field, str(how.get("method") or how.get("mode") or "")]) for field, how in given.items()]
        return {"words": words, "tags": [], "facts": {}}
    return {"words": known.words(), "tags": known.tags(), "facts": {}}


def _unit(name: str) -> str:
    return "fraction" if name in _FRACTIONS else "number"
