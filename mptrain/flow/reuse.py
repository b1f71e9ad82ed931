"""Stages of other runs that this one has in common with them, taken over instead of trained again."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mptrain.core.disk import read_json
from mptrain.core.errors import UserError
from mptrain.flow.run_folder import IDENTITY, is_live
from mptrain.recipe import EXPORTS

log = logging.getLogger(__name__)

_AFTER_TRAINING = ("schema", "name", "description", "stages", "export", "evaluate", "gates", "planning", "output")
"""fields that a stage's result does not depend on but for `_read_by_stage`; of `stages` it does on those up to it"""


_SHARED = ("data_hash", "models", "versions", "processes")
"""parts of run.json beside the recipe on which every stage depends"""


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _AFTER_TRAINING}


def _read_by_stage(recipe: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """What flow/stage.py reads of `evaluate` and `export` for a stage; of a stage that does not read it nothing."""
    found: dict[str, Any] = {}
    if ((stage.get("prune") or {}).get("keep") or {}).get("latency"):
        found["threads"] = recipe["evaluate"]["latency"]["threads"][:1]  # with which the budget is measured
    if stage.get("train"):
        found["peaks"] = any("fp16" in export["precision"] for export in recipe["export"])
    if (stage.get("palettize") or {}).get("size_budget"):
        exports = [e for e in recipe["export"] if stage["id"] in e["of"] and e["format"] in EXPORTS]
        widths = [EXPORTS[e["format"]].model_validate(e).widths() for e in exports]
        found["widths"] = sorted(frozenset(range(1, 9)).intersection(*widths))  # bits to choose from
    return found


def check_reuse(folders: Sequence[Path], cleared: Path | None = None) -> None:
    """Raises UserError for what is no run, a live one, or the one that is about to be `cleared`."""
    for folder in folders:
        if cleared is not None and folder.resolve() == cleared.resolve():
            raise UserError(f"--reuse: {folder} is the run that --fresh deletes; give another output.dir.")
        if not (folder / IDENTITY).is_file():
            raise UserError(f"--reuse: {folder} holds no run of mptrain; give the folder of one.")
        if is_live(folder):
            raise UserError(f"--reuse: the run in {folder} is still going on; wait for it, or stop it.")


def take_stages(folder: Path, identity: dict[str, Any], others: Sequence[Path]) -> None:
    """Copy into the run in `folder` the finished stages that a run in `others` has in common with it.

    identity: of the run in `folder`, as in its run.json. A stage is the same when all stages up to it, model,
    data and their content, seed, versions and number of processes are, and what it reads of evaluate and export is.
    """
    for other in others:
        theirs = read_json(other / IDENTITY)
        ours = identity["recipe"]
        same = all(theirs.get(key) == identity.get(key) for key in _SHARED)
        same = same and _settings(theirs["recipe"]) == _settings(ours)
        for stage, their_stage in zip(ours["stages"], theirs["recipe"]["stages"]):
            same = same and stage == their_stage
            if not same or _read_by_stage(ours, stage) != _read_by_stage(theirs["recipe"], stage):
                break
            source, target = other / "stages" / stage["id"], folder / "stages" / stage["id"]
            if target.exists() or not source.is_dir():
                continue
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                shutil.copytree(source, Path(temporary) / "stage")
                (Path(temporary) / "stage").rename(target)
            log.info("stage %s is the one of %s", stage["id"], other)
        if not any(folder.glob("stages/*")):
            log.warning("nothing is taken over from %s: %s", other, _first_difference(theirs, identity))


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in _SHARED:
        if theirs.get(key) != ours.get(key):
            return f"{key} differ"
    if _settings(theirs["recipe"]) != _settings(ours["recipe"]):
        return "the recipes differ before their first stage"
    return "their first stages differ, or what those read of evaluate and export"
