"""A family in one run: `keep: {speedup: [2, 3, 4]}` in a stage makes a stage of each point when the recipe is read.

    jpqd  ──►  jpqd-2x, from where jpqd starts  ──►  jpqd-3x, from jpqd-2x  ──►  jpqd-4x, from jpqd-3x

Each has the stage's settings. The first trains as long as the stage says; the others, of which each begins with a
model that is trained already, `recovery` of that, the pruning's own schedule with it. Speed-ups count against where the
family starts, or `against`, so that misses do not add up. Exports of the stage are exports of all its points; a teacher
`self` is where the family starts. From there on the recipe is one of ordinary stages.

Curvature and other statistics are those of the model as it is at each point; what its blocks cost is measured once
(compress/prune/measured.py).
"""

from __future__ import annotations

import copy
from typing import Any

from mptrain.core.errors import RecipeError

Lines = dict[tuple[str | int, ...], int]

RECOVERY = 0.5
"""of `train.epochs`, where `recovery` is not given"""


def expanded(data: Any, source: str, lines: Lines) -> tuple[Any, Lines]:
    """The recipe in plain data with a stage for each point, and the lines of its keys. What is no family is returned as
    it is. Raises RecipeError for points that no family has, and for names that would mean several stages."""
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, list) or not any(points_of(stage) for stage in stages):
        return data, lines
    found: list[Any] = []
    origin: list[int] = []
    members: dict[str, list[str]] = {}
    for index, stage in enumerate(stages):
        before = found[-1]["id"] if found and isinstance(found[-1], dict) and "id" in found[-1] else "model"
        made = _stages(stage, before, source, members) if points_of(stage) else [stage]
        found += made
        origin += [index] * len(made)
    data = {**data, "stages": found, "export": _exports(data.get("export"), members)}
    _check_names(data, members, source)
    moved = {key: line for key, line in lines.items() if key[:1] != ("stages",) or len(key) < 2}
    for new, old in enumerate(origin):
        moved |= {("stages", new, *key[2:]): line for key, line in lines.items() if key[:2] == ("stages", old)}
    return data, moved


def points_of(stage: Any) -> list[Any] | None:
    """The list of a family; None where there is none."""
    for key in ("prune", "keep", "speedup"):
        stage = stage.get(key) if isinstance(stage, dict) else None
    return stage if isinstance(stage, list) and stage else None


def _stages(stage: dict[str, Any], before: str, source: str, members: dict[str, list[str]]) -> list[dict[str, Any]]:
    points, name, keep = points_of(stage) or [], stage.get("id"), stage["prune"]["keep"]
    if not isinstance(name, str):
        raise RecipeError(
            f"{source}: stages: the family of speedup {points} needs an id, of which those of its stages are made, got"
            f" {name!r}; write e.g. id: small."
        )
    numbers = [p for p in points if isinstance(p, int | float) and not isinstance(p, bool) and p > 1]
    if len(numbers) < len(points) or sorted(set(numbers)) != numbers:
        raise RecipeError(
            f"{source}: stages.{name}.prune.keep.speedup: a family is ascending numbers above 1, each pruned from the"
            f" last, got {points}; write e.g. [2, 3, 4]."
        )
    start, recovery = stage.get("from") or before, _recovery(stage, source)
    against = start if keep.get("against") is None else keep["against"]
    found: list[dict[str, Any]] = []
    for point in points:
        one = copy.deepcopy(stage)
        one["id"] = f"{name}-{point:g}x"
        one["from"] = start if not found else found[-1]["id"]
        one["prune"]["keep"] = {**keep, "speedup": float(point), "against": against}
        one["prune"]["keep"].pop("recovery", None)
        if found:
            _shorten(one, recovery)
        if one.get("teacher") == "self":
            one["teacher"] = start
        found.append(one)
    members[name] = [one["id"] for one in found]
    return found


def _recovery(stage: dict[str, Any], source: str) -> float:
    """Raises RecipeError for what is no share, and for one of no training."""
    value = stage["prune"]["keep"].get("recovery", RECOVERY)
    if "recovery" in stage["prune"]["keep"] and stage.get("train") is None:
        raise RecipeError(
            f"{source}: stages.{stage['id']}.prune.keep.recovery: {value!r} is a share of train.epochs, and the stage"
            " has no train: give train, or drop recovery."
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(
            f"{source}: stages.{stage['id']}.prune.keep.recovery: the share of train.epochs that each point after"
            f" the first trains is above 0 and at most 1, got {value!r}; default {RECOVERY}."
        )
    return value


def _shorten(stage: dict[str, Any], share: float) -> None:
    """Epochs of the training and of the pruning's warm-up; what is no number is said later."""
    parts: list[tuple[Any, tuple[str, ...]]] = [(stage.get("train"), ("epochs",))]
    parts.append((stage["prune"].get("schedule"), ("start", "end")))
    for settings, names in parts:
        for name in names if isinstance(settings, dict) else ():
            if isinstance(settings.get(name), int | float) and not isinstance(settings[name], bool):
                settings[name] = round(settings[name] * share, 6)


def _exports(exports: Any, members: dict[str, list[str]]) -> Any:
    """Of a family, exports of all its points."""
    if not isinstance(exports, list):
        return exports
    found = []
    for export in exports:
        of = export.get("of") if isinstance(export, dict) else None
        if isinstance(of, list):
            export = {**export, "of": [each for name in of for each in _members(name, members)]}
        found.append(export)
    return found


def _members(name: Any, members: dict[str, list[str]]) -> list[Any]:
    """Of a family; what is no name is said later."""
    return members.get(name, [name]) if isinstance(name, str) else [name]


def _check_names(data: dict[str, Any], members: dict[str, list[str]], source: str) -> None:
    for stage in data["stages"]:
        for field in ("from", "teacher", "prune.keep.against"):
            name = stage
            for key in field.split("."):
                name = name.get(key) if isinstance(name, dict) else None
            if isinstance(name, str) and name in members:
                raise RecipeError(
                    f"{source}: stages.{stage.get('id')}.{field}: {name!r} is a family; give one of its stages,"
                    f" {', '.join(members[name])}."
                )
