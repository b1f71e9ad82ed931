"""A grid of runs: every combination of the values given for some fields of a recipe.

Each point is a run of its own, so a sweep that was stopped continues where it was. Stages that
a point has in common with an earlier one, from the first stage on, are taken over, not trained
again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptrain.core.disk import write_json
from mptrain.core.errors import GateFailed, RecipeError
from mptrain.recipe import Recipe, file

log = logging.getLogger(__name__)

MAX_POINTS = 200


@dataclass(frozen=True)
class Point:
    values: dict[str, Any]
    recipe: Recipe


def points(name: str, overrides: Sequence[str], axes: Sequence[str]) -> list[Point]:
    """The grid of recipe `name`. axes: "KEY=V1,V2,…"; overrides: "KEY=VALUE" for all points.

    Raises RecipeError; all points are checked before any is run.
    """
    keys = [axis.partition("=")[0].strip() for axis in axes]
    if len(set(keys)) != len(keys):
        raise RecipeError(f"--sweep: {max(keys, key=keys.count)} is given twice; put all its values into one list.")
    values = [_values(axis) for axis in axes]
    grid = list(itertools.product(*values))
    if len(grid) > MAX_POINTS:
        raise RecipeError(f"--sweep: {len(grid)} points are more than {MAX_POINTS}; give fewer values.")
    wanted = [dict(zip(keys, chosen)) for chosen in grid]
    found = []
    for given, folder_name in zip(wanted, _folder_names(wanted)):
        recipe = file.read(name, [*overrides, *(f"{k}={v}" for k, v in given.items())]).recipe
        folder = Path(f"{recipe.output.dir}-sweep") / folder_name
        output = recipe.output.model_copy(update={"dir": str(folder)})
        found.append(Point(given, recipe.model_copy(update={"output": output})))
    return found


def _values(axis: str) -> list[str]:
    key, equals, raw = axis.partition("=")
    inner = raw.strip().removeprefix("[").removesuffix("]")
    found = [word.strip() for word in inner.split(",")]
    if not equals or not key.strip() or not all(found):
        raise RecipeError(
            f"--sweep {axis!r}: write KEY=V1,V2, e.g. --sweep stages.jpqd.prune.keep.encoder_params=0.6,0.5,0.33."
        )
    if len(set(found)) != len(found):
        raise RecipeError(f"--sweep {axis!r}: {max(found, key=found.count)} is given twice.")
    return found


def _folder_names(grid: list[dict[str, str]]) -> list[str]:
    """A folder for each point; a hash of the values tells apart those that have one slug, such as a/b and a-b."""
    slugs = [_slug(given) for given in grid]
    count = Counter(slugs)
    return [slug if count[slug] == 1 else f"{slug}-{_hash(given)}" for given, slug in zip(grid, slugs)]


def _hash(values: dict[str, str]) -> str:
    return hashlib.sha256("\0".join(values.values()).encode()).hexdigest()[:8]


def _slug(values: dict[str, str]) -> str:
    """A folder name: the last word of each key where that tells them apart, and its value."""
    lasts = [key.rpartition(".")[2] for key in values]
    names = lasts if len(set(lasts)) == len(lasts) else list(values)
    text = "_".join(f"{name}-{value}" for name, value in zip(names, values.values()))
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())


def sweep(grid: Sequence[Point], *, fresh: bool = False, allow_code: bool = False) -> dict[str, Any]:
    """Run all points, in order; writes sweep.json beside their folders and returns it.

    Returns {"schema": "mptrain.commands.sweep/v1", "points": [{"values", "folder", "gates_passed", "variants":
    [{"id", "metric", "value", "n", "ci95", "size_bytes", …}], "comparisons"}]}. A missed gate is noted and does
    not stop the sweep; GateFailed when no point passed all its gates. Raises what `run` raises.
    """
    from mptrain.report.render.files import read
    from mptrain.run import run

    done: list[Path] = []
    rows = []
    for number, point in enumerate(grid, 1):
        folder = Path(point.recipe.output.dir)
        log.info("== point %d of %d: %s", number, len(grid), ", ".join(f"{k}={v}" for k, v in point.values.items()))
        try:
            report = run(point.recipe, fresh=fresh, allow_code=allow_code, reuse=done)
        except GateFailed as missed:
            log.warning("%s", missed)
            report = read(folder)
        done.append(folder)
        if report:  # the main process
            rows.append(_row(point, folder, report))
            write_json(folder.parent / "sweep.json", {"schema": "mptrain.commands.sweep/v1", "points": rows})
    if rows and not any(row["gates_passed"] for row in rows):
        raise GateFailed(f"no point of the sweep passed all its gates; see {folder.parent}/sweep.json.")
    return {"schema": "mptrain.commands.sweep/v1", "points": rows}


def _row(point: Point, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    metric = report["metric"]["name"]
    variants = [
        {"id": v["id"], "metric": metric, **v["metrics"][metric]}
        | {key: v[key] for key in ("size_bytes", "params", "latency_ms")}
        for v in report["variants"]
        if metric in v["metrics"]
    ]
    return {
        "values": point.values,
        "folder": folder.name,
        "gates_passed": all(gate["passed"] for gate in report["gates"]),
        "variants": variants,
        "comparisons": report["comparisons"],
    }
