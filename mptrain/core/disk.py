"""Files and folders that are whole or not there: JSON, exported folders, locks, hashes, the cache folder."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mptrain.core.errors import MptrainError, UserError


def write_json(path: Path, value: Any) -> None:
    """Write so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MptrainError(f"{path}: cannot be read ({error}). Start again with --fresh.") from None


def cache_folder() -> Path:
    """$MPTRAIN_CACHE, or ~/.cache/mptrain."""
    return Path(os.environ.get("MPTRAIN_CACHE") or Path.home() / ".cache" / "mptrain").absolute()


def check_writable(folder: Path) -> None:
    """Raise UserError where no folder can be made beside `folder`, before the work whose result goes there."""
    _scratch(folder).rmdir()


@dataclass(frozen=True)
class Code:
    """Of a model that transformers does not know. files: its Python. names: by Auto class "file.Class", as `auto_map`
    of config.json has them."""

    files: Sequence[Path]
    names: Mapping[str, str]


@contextmanager
def whole(
    folder: Path, config: Any = None, processor: Any = None, generation: Any = None, code: Code | None = None
) -> Iterator[Path]:
    """Yields an empty folder for the model's files; when the block ends well it takes the place of `folder`.

    What an export that was killed left of its temporary folder is deleted.
    config: of the model, written as config.json without what an exported model has no use for. processor: saved too.
    generation: the generation config of a model that is exported with a key-value cache, written beside the config;
    both then say use_cache, and false without. code: shipped, for what reads the config of such a model needs it.
    Raises UserError where nothing can be written.
    """
    scratch = _scratch(folder)
    try:
        yield scratch
        if config is not None:
            described = config.to_dict()
            described.pop("auto_map", None)  # an exported model needs no modeling code, but for its config
            if code is not None:
                described["auto_map"] = dict(code.names)
            if "use_cache" in described:  # it takes none from its caller; optimum-intel refuses one that says it does
                described["use_cache"] = generation is not None
            _write_config(scratch / "config.json", described)
        if generation is not None:
            _write_config(scratch / "generation_config.json", generation.to_diff_dict() | {"use_cache": True})
        for file in () if code is None else code.files:
            shutil.copy(file, scratch / file.name)
        if processor is not None:
            processor.save_pretrained(scratch)
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _scratch(folder: Path) -> Path:
    """A new folder beside another, of those of killed processes the only one left."""
    prefix = f".{folder.name}.mptrain-"  # no name that a user's own folder beside it may have
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: nothing can be written there ({error.strerror}); choose another folder.") from None


def _write_config(file: Path, described: dict[str, Any]) -> None:
    file.write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")


def size(package: Path) -> int:
    """Bytes of all files below a package."""
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Wait for the lock and hold it: one process has it, and its death frees it. Raises OSError."""
    with FileLock(lock):
        yield


@contextmanager
def held_at_once(lock: Path) -> Iterator[None]:
    """Hold the lock; the process number of the holder stands beside it.

    Raises Busy when another process has it, OSError when the folder cannot be written.
    """
    waiting, holder = _waiting(lock), lock.with_name(f".{lock.name}-holder")
    try:
        waiting.acquire()
    except Timeout:
        raise Busy(_text(holder) or "unknown") from None
    try:
        holder.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        waiting.release()


class Busy(Exception):
    """A lock is held by another process; its number, as far as it is known, is the message."""


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock; the file is not made."""
    if not lock.is_file():
        return False
    try:
        with _waiting(lock):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _waiting(lock: Path) -> FileLock:
    """Gives up in a moment, not at once: whoever only asks whether a lock is held has it for an instant."""
    return FileLock(lock, timeout=0.5, poll_interval=0.02)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
