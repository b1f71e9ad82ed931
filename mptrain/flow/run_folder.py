"""The folder of a run: one live run at a time, and proof that a resume continues the same run.

run.json      what the run is (identity.py)
lock          held while a run is alive; the kernel frees it on any death
stages/…      one folder per phase: checkpoints, log, and when done the model
export/…      one folder per variant
report.*      the result
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mptrain.core.disk import Busy, held_at_once, is_held, read_json, write_json
from mptrain.core.errors import MptrainError, ResumeError, UserError

log = logging.getLogger(__name__)

IDENTITY = "run.json"
LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make the folder if needed and hold its lock. Raises UserError when it is in use or not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held_at_once(folder / LOCK)
        lock.__enter__()
    except Busy as holder:
        raise UserError(
            f"{folder} is in use by another live run (process {holder}). Wait for it, stop it,"
            " or give this run another folder with --set output.dir=DIR."
        ) from None
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        yield folder
    finally:
        lock.__exit__(None, None, None)


def is_live(folder: Path) -> bool:
    """Whether a process holds the lock of the run in folder."""
    return is_held(folder / LOCK)


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"output.dir {folder}: cannot be written ({error.strerror}). Choose another folder with --set output.dir=DIR."
    )


def clear(folder: Path) -> None:
    """Delete an earlier run, and nothing that is not one. Needs the lock. Raises UserError."""
    entries = [p for p in folder.iterdir() if p.name not in (LOCK, f".{LOCK}-holder")]
    if entries and not (folder / IDENTITY).is_file():
        raise UserError(
            f"--fresh: {folder} is not empty and holds no run of mptrain, so nothing was deleted."
            " Choose another folder with --set output.dir=DIR."
        )
    # the identity goes last: a killed clean-up is still known as a run
    for path in sorted(entries, key=lambda p: p.name == IDENTITY):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write the identity of a new run, or compare it with the one there. Raises ResumeError naming what changed."""
    path = folder / IDENTITY
    if not path.is_file():
        others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(".")]
        if others:
            raise UserError(
                f"output.dir {folder} is not empty ({', '.join(sorted(others)[:3])}) and holds no run of mptrain."
                " Choose another folder with --set output.dir=DIR."
            )
        write_json(path, identity)
        return
    before, now = read_json(path), json.loads(json.dumps(identity))
    if not isinstance(before, dict):
        raise MptrainError(f"{path}: is no description of a run, so it is damaged. Start again with --fresh.")
    if before.get("format") != now.get("format"):
        raise ResumeError(
            f"{folder} holds a run of another version of mptrain (its stages have format {before.get('format', 1)},"
            f" here it is {now['format']}), which cannot be continued. Its report can still be printed: mptrain report"
            f" {folder}. Delete that run and start again with --fresh, or keep both with --set output.dir=DIR."
        )
    for facts in (before, now):
        facts.pop("stages", None)  # made from the recipe
    machine = list(differences(before.pop("machine", None), now.pop("machine", None), "machine"))
    if machine:
        log.warning("%s; the last bits of the result may depend on it.", "; ".join(machine))
    changes = list(differences(before, now, ""))
    if changes:
        raise ResumeError(
            f"{folder} holds a run that differs: {'; '.join(changes[:5])}{' …' if len(changes) > 5 else ''}."
            " Undo the change to resume, delete that run and start again with --fresh, or keep both with"
            f" --set output.dir=DIR; --reuse {folder} then takes over the stages that both have in common."
        )


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in list(old) + [k for k in new if k not in old]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new)):
            name = b.get("id", index) if isinstance(b, dict) else index
            yield from differences(a, b, f"{path}.{name}")
    elif old != new:
        yield f"{path} was {old!r} and is {new!r}"
