"""The rows of a task file of lm-eval, read by `datasets` as lm-eval does, so that cells have the same types.

Local are: dataset_path json, csv, parquet or text with dataset_kwargs.data_files, a folder with such files, and a
folder of `save_to_disk`. Any other name is one of the hub, or of its cache. Dataset scripts are never run.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mptrain.core.errors import DataError
from mptrain.data.lm_eval.task_file import Document, TaskFile

FORMATS = ("json", "csv", "parquet", "text")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def on_hub(task: TaskFile) -> bool:
    """Whether the rows of a task are those of a name on the hub, or in its cache."""
    named = task.dataset_path not in FORMATS and not task.dataset_kwargs.get("data_files")
    return named and not Path(task.dataset_path).expanduser().is_dir() and bool(_HUB_NAME.fullmatch(task.dataset_path))


def read_rows(task: TaskFile, splits: Iterable[str]) -> dict[str, list[Document]]:
    """Rows of the splits. Raises DataError that names the key of the task file."""
    known = ("data_files", "trust_remote_code")
    for key, value in task.dataset_kwargs.items():
        if key not in known or (key == "trust_remote_code" and value is not False):
            task.refuse(f"dataset_kwargs.{key}", f"{value!r} is not supported; only data_files is")
    files = _files(task)
    path = Path(task.dataset_path).expanduser()
    if task.dataset_path in FORMATS:
        if not files:
            task.refuse("dataset_kwargs.data_files", f"is missing; dataset_path {task.dataset_path} needs it")
        found = _load(task, task.dataset_path, None, files, local=True)
    elif files:
        task.refuse("dataset_kwargs.data_files", f"needs dataset_path {', '.join(FORMATS)}, got {task.dataset_path}")
    elif path.is_dir():
        found = _saved(task, path) if _is_saved(path) else _load(task, str(path), task.dataset_name, None, local=True)
    elif not _HUB_NAME.fullmatch(task.dataset_path):
        task.refuse("dataset_path", f"there is no folder {path.absolute()}, and this is no name of the hub")
    else:
        found = _load(task, task.dataset_path, task.dataset_name, None, local=False)
    rows = {}
    for split in dict.fromkeys(splits):
        if split not in found:
            task.refuse("split", f"the data has no split {split!r}; its splits are {', '.join(found)}")
        rows[split] = list(found[split])
        if not rows[split]:
            task.refuse("split", f"{split!r} holds no rows")
    return rows


def _files(task: TaskFile) -> dict[str, list[str]]:
    """{split: paths}; as `datasets` has it, files without a split are `train`."""
    given = task.dataset_kwargs.get("data_files") or {}
    by_split = given if isinstance(given, dict) else {"train": given}
    return {s: [_file(task, f) for f in (fs if isinstance(fs, list) else [fs])] for s, fs in by_split.items()}


def _file(task: TaskFile, name: Any) -> str:
    """lm-eval's relative paths start from the working directory; those that are not there, from the task file."""
    if not isinstance(name, str) or "://" in name or "*" in name:
        task.refuse("dataset_kwargs.data_files", f"{name!r}: must be the path of a local file, without wildcards")
    places = [Path(name).expanduser().absolute(), task.folder / Path(name).expanduser()]
    for place in places:
        if place.is_file():
            return str(place)
    task.refuse(
        "dataset_kwargs.data_files", f"there is no file {' and no file '.join(map(str, dict.fromkeys(places)))}"
    )


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved(task: TaskFile, path: Path) -> dict[str, Any]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        task.refuse("dataset_path", f"{path} cannot be read by `datasets` load_from_disk: {error}")
    return dict(found) if isinstance(found, DatasetDict) else {"train": found}


def _load(task: TaskFile, path: str, name: str | None, files: Any, *, local: bool) -> dict[str, Any]:
    from datasets import load_dataset
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    options: dict[str, Any] = {"data_files": files}
    if "trust_remote_code" in inspect.signature(load_dataset).parameters:  # datasets 3; later ones run no scripts
        options["trust_remote_code"] = False
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # its reader of csv leaves the file to the collector
            if local:
                # A cache that stays could serve the content of a file as it once was.
                options |= {"cache_dir": cache, "keep_in_memory": True}
            return dict(load_dataset(path, name, **options))
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, pandas, huggingface_hub and httpx each raise their own kinds
        where = f"{path}{f' ({name})' if name else ''}"
        hint = (
            "" if local else ". Without a network, save it once with `datasets` save_to_disk, and give that folder here"
        )
        raise DataError(
            f"{task.path}: dataset_path: {where} could not be read: {type(error).__name__}: {error}{hint}."
        ) from error
    finally:
        if shown:
            enable_progress_bars()
