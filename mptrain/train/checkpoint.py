"""Checkpoints without pickle: tensors in safetensors, everything else in JSON.

A checkpoint folder is whole when `manifest.json` is there and every file it lists has the
size and SHA-256 it says; the manifest is written last. So a killed or truncated write is
told from a good checkpoint, and the one before is used instead.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mptrain.core.disk import sha256
from mptrain.core.errors import TrainingError, UserError
from mptrain.models.artifact import unique_tensors
from mptrain.precision import moments8

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PLAIN_WEIGHTS = "model.safetensors"

FOREIGN = ("optimizer.pt", "scheduler.pt")
"""files in which transformers' own Trainer looks for what a checkpoint of ours keeps elsewhere"""
STOP = """This is no pickle. It makes transformers.Trainer stop, which would go on from this checkpoint with a fresh
optimizer: the state is in optimizer.safetensors and scheduler.json. Resume with mptrain.Trainer, or make
files that transformers.Trainer resumes from:

    python -c "from mptrain.train.checkpoint import for_transformers; for_transformers('{folder}')"
"""

log = logging.getLogger(__name__)


def save_state(state: Any, path: Path) -> None:
    """Write a nested state (dicts, lists, tensors, numbers, strings) to path.json and path.safetensors."""
    tensors: dict[str, Tensor] = {}
    plain = _pack(state, tensors, "t")
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(plain))


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote; tensors arrive on the CPU."""
    plain = json.loads(Path(f"{path}.json").read_text())
    return _unpack(plain, load_file(f"{path}.safetensors"))


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        # pairs, because JSON would turn the integer keys of an optimizer state into strings
        return {"items": [[k, _pack(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot save a {type(value).__name__} at {name} in a checkpoint")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _unpack(v, tensors) for k, v in value["items"]}
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    return value


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without the second names of tied tensors."""
    return unique_tensors(model)[0]


def second_names(model: nn.Module) -> set[str]:
    """Names of tied tensors that a file does without."""
    return set(unique_tensors(model)[1])


def stop_transformers(folder: Path) -> None:
    """Let transformers' own Trainer fail on a checkpoint of ours, instead of starting its optimizer anew in silence."""
    for name in FOREIGN:
        (folder / name).write_text(STOP.format(folder=folder))


def for_transformers(folder: str | Path) -> None:
    """Write the optimizer and the scheduler of a checkpoint as transformers' own Trainer reads them.

    Masters are left out, for the checkpoint's weights are fp32. Raises UserError when it is no whole checkpoint of
    mptrain.Trainer.
    """
    folder = Path(folder)
    why = fault(folder)
    if why is not None:
        raise UserError(f"{folder} is not a whole checkpoint of mptrain.Trainer: {why}")
    if not (folder / "optimizer.json").is_file():
        raise UserError(f"{folder} holds shards of FSDP2: resume it with mptrain.Trainer without FSDP2, and save again")
    state = moments8.plain(load_state(folder / "optimizer"))
    torch.save({k: state[k] for k in ("state", "param_groups")}, folder / FOREIGN[0])
    torch.save(load_state(folder / "scheduler"), folder / FOREIGN[1])


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path)


def save_weights(model: nn.Module, path: Path) -> None:
    save_tensors(model_tensors(model), path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy tensors into the model's own, bit for bit. Raises TrainingError when names or shapes differ."""
    load_tensors(model, load_file(path), path)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """path: where they are from, for the error."""
    own = model_tensors(model)
    extra, missing = sorted(set(tensors) - set(model.state_dict())), sorted(set(own) - set(tensors))
    if extra or missing:
        raise TrainingError(
            f"{path} does not fit the model: missing {missing[:3]}, unexpected {extra[:3]}."
            " It was written by another version or recipe; start again with --fresh."
        )
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest: the checkpoint is whole from here on."""
    files = {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (MANIFEST, *FOREIGN)
    }
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps({"files": files, **facts}, indent=1))
    os.replace(temporary, folder / MANIFEST)


def fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    except FileNotFoundError:
        return "it was not finished" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def latest(folder: Path, *, foreign: bool = False) -> Path | None:
    """The newest whole checkpoint-N below folder; says so when a newer one is not whole.

    foreign: those of transformers' own Trainer count, too; they have no manifest, and nothing is known of them.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    for _, path in sorted(found, reverse=True):
        why = None if foreign and _is_foreign(path) else fault(path)
        if why is None:
            return path
        log.warning("%s is not usable: %s; falling back to the checkpoint before it.", path, why)
    return None


def usable(asked: str | Path | bool, folder: Path) -> Path:
    """The checkpoint to resume from. asked: True for the newest whole one below folder, or one. Raises UserError."""
    if asked is True:
        found = latest(folder, foreign=True)
        if found is None:
            raise UserError(
                f"resume_from_checkpoint=True: no whole checkpoint in {folder}. Leave it out to train from the start."
            )
        return found
    path = Path(str(asked))
    why = None if _is_foreign(path) else fault(path)
    if why is not None:
        raise UserError(
            f"resume_from_checkpoint: {path} is not a whole checkpoint: {why}."
            " Give an older one, or True for the newest whole one."
        )
    return path


def _is_foreign(folder: Path) -> bool:
    return (folder / "training_args.bin").is_file() and not (folder / MANIFEST).is_file()


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())
