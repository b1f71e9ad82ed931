"""What a teacher says of each example, asked once instead of in every epoch.

A teacher in eval mode says the same of an example each time, and beside a small student its forward pass is much of a
step: half, where a MiniLM teaches one that is eight times as fast. Where its outputs alone are compared and none has an
axis of tokens, they are a few numbers to an example. They are kept by what the model reads of it, so that a batch may
be any of them, and what is not among them is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mptrain.data.sealed import kept

_WHAT = "teacher's outputs"
_KEYS = "keys"  # uint8 [examples, _SIZE]; the other tensors are outputs, [examples, …]
_SIZE = 16  # bytes of a key


class Taught:
    """outputs: by name, float32 [examples, …]; keys: of the examples, as `keys_of` makes them."""

    def __init__(self, keys: list[bytes], outputs: Mapping[str, Tensor]) -> None:
        self.outputs = dict(outputs)
        self._rows = {key: row for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The outputs for a batch without targets, on its device; None where one of its examples is not known."""
        rows = [self._rows.get(key) for key in keys_of(inputs)]
        if None in rows:
            return None
        device = next(iter(inputs.values())).device
        index = torch.tensor(rows)
        return {name: value[index].to(device) for name, value in self.outputs.items()}

    @classmethod
    def load(cls, paths: Iterable[Path], secret: bytes | None = None) -> Taught:
        """From files of `write`, one to each process. Raises MptrainError for files of other data."""
        parts = [load(kept.read(path, secret, _WHAT)) for path in paths]
        names = dict.fromkeys(name for part in parts for name in part)  # a process may have had no share
        both = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
        return cls([bytes(key) for key in both.pop(_KEYS).numpy()], both)


def write(
    path: Path,
    batches: Iterable[Mapping[str, Tensor]],
    ask: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    names: Iterable[str],
    secret: bytes | None = None,
) -> None:
    """Asks the teacher and keeps its answers, whole or not at all. batches: without targets. names: of the outputs.
    secret: of encrypted data; the file is encrypted under it."""
    keys: list[bytes] = []
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for batch in batches:
            outputs = ask(batch)
            keys += keys_of(batch)
            for name, values in found.items():
                values.append(outputs[name].float().cpu())
    tensors = {name: torch.cat(values) for name, values in found.items() if values}
    tensors[_KEYS] = torch.tensor([*b"".join(keys)], dtype=torch.uint8).view(len(keys), _SIZE)
    kept.write(path, save(tensors), secret, _WHAT)


def keys_of(inputs: Mapping[str, Tensor]) -> list[bytes]:
    """Of each example of a batch, a digest of what a model reads of it: of what has the shape of a two-dimensional
    attention mask, that which it does not mask, and all of anything else, its shape too."""
    inputs = {name: value.cpu() for name, value in sorted(inputs.items())}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        mask = None
    found = []
    for row in range(len(next(iter(inputs.values())))):
        digest = hashlib.blake2b(digest_size=_SIZE)
        for name, value in inputs.items():
            one = value[row]
            if mask is not None and value.shape == mask.shape:
                one = one[mask[row].bool()]
            digest.update(f"{name} {tuple(one.shape)} {one.dtype}\0".encode())
            digest.update(one.reshape(-1).view(torch.uint8).numpy().data)  # NumPy has no bf16
        found.append(digest.digest())
    return found
