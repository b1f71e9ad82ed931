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
from mptrain.flow.run_folder import IDENTITY, differences, is_live
from mptrain.flow.stage_inputs import given

log = logging.getLogger(__name__)

_SHARED = ("format", "data_hash", "models", "versions", "processes")
"""parts of run.json, beside the inputs of the stages, on which every stage depends"""


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

    identity: of the run in `folder`, as in its run.json. A stage is the same when its inputs are (`StageInputs`), and
    data, model files, versions and number of processes.
    """
    for other in others:
        theirs = read_json(other / IDENTITY)
        same = all(theirs.get(key) == identity.get(key) for key in _SHARED)
        for stage, inputs in identity["stages"].items() if same else ():
            source, target = other / "stages" / stage, folder / "stages" / stage
            # a field that an older run did not have and that is null here changes nothing
            changed = any(differences(given(theirs["stages"].get(stage, {})), inputs, ""))
            if changed or target.exists() or not source.is_dir():
                continue
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                shutil.copytree(source, Path(temporary) / "stage")
                (Path(temporary) / "stage").rename(target)
            log.info("stage %s is the one of %s", stage, other)
        if not any(folder.glob("stages/*")):
            log.warning("nothing is taken over from %s: %s", other, _first_difference(theirs, identity))


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    if theirs.get("format") != ours["format"]:
        return "another version of mptrain made it, which did not write down what its stages read"
    for key in _SHARED:
        if theirs.get(key) != ours.get(key):
            return f"{key} differ"
    for stage, inputs in ours["stages"].items():
        if changed := list(differences(given(theirs["stages"].get(stage, {})), inputs, f"stage {stage}: ")):
            return changed[0]
    return "it finished none of the stages that both have"
