"""The training examples that reached the largest activations, so that fp16 exports are checked on them.

A value that overflows fp16 once in ten thousand examples is in no calibration set that is drawn at random, and training
has computed it anyway. Hooks keep, of every module, the largest |output| and the inputs of the example that gave it.
An export adds these examples to its calibration batches; it searches and verifies on the trained weights, so what was
large early in training and no longer is costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mptrain.core.hooks import HOOKS
from mptrain.core.signature import Batch
from mptrain.data.sealed import kept

_WHAT = "kept examples"
FILES = "peaks-*.safetensors"  # one to each process
KEPT = 16
"""examples that join a calibration: those of the modules with the largest values"""


class Peaks:
    """Watches a model in training until `remove`. Two passes over every output and a sync a step.

    path: of the file, which `load` reads again when a run is resumed. largest: |x| by module, inf where it overflowed.
    Only outputs with one row per example count.
    """

    def __init__(self, model: nn.Module, path: Path, secret: bytes | None = None) -> None:
        """secret: of encrypted data; what is kept of its examples is encrypted under it."""
        self.path, self.secret = path, secret
        self.largest: dict[str, float] = {}
        self._examples: dict[str, Batch] = {}
        self._seen: dict[str, Tensor] = {}  # by module: the largest of each row of the last forward
        names = [(n, m) for n, m in model.named_modules() if n and not n.startswith(HOOKS)]
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in names]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if (
                module.training
                and isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dim() > 1
                and value.numel()
            ):
                with torch.no_grad(), torch._C.DisableTorchFunction():  # NNCF numbers the functions it sees
                    rows = value.detach().flatten(1)
                    self._seen[name] = torch.maximum(rows.amax(1), -rows.amin(1)).float()

        return hook

    def step(self, inputs: Mapping[str, Tensor]) -> None:
        """After a forward in training on `inputs`, which are those of the model, without targets."""
        rows = len(next(iter(inputs.values())))
        seen = {name: value for name, value in self._seen.items() if len(value) == rows}
        self._seen = {}
        if not seen:
            return
        values = torch.stack(list(seen.values()))
        found, where = torch.where(values.isnan(), 0.0, values).max(1)
        examples: dict[int, Batch] = {}
        for name, value, row in zip(seen, *torch.stack([found, where.to(found.dtype)]).tolist()):
            if value > self.largest.get(name, 0.0):
                self.largest[name] = value
                if int(row) not in examples:
                    examples[int(row)] = {
                        key: given[int(row)].detach().cpu().clone()
                        for key, given in inputs.items()
                        if len(given) == rows
                    }
                self._examples[name] = examples[int(row)]

    def save(self) -> None:
        """Whole or not at all."""
        numbers = {id(example): str(i) for i, example in enumerate(self._examples.values())}
        tensors = {f"{numbers[id(e)]}/{k}": v for e in self._examples.values() for k, v in e.items()}
        rows = {name: [value, numbers[id(self._examples[name])]] for name, value in self.largest.items()}
        kept.write(self.path, save(tensors, {"peaks": json.dumps(rows)}), self.secret, _WHAT)

    def load(self) -> None:
        self.largest, self._examples = _read(self.path, self.secret) if self.path.is_file() else ({}, {})


def batches(folders: Iterable[Path], secret: bytes | None = None) -> list[Batch]:
    """From the first folder that has files: the KEPT examples of the modules with the largest values.

    Each is in a batch of two, for a size of one would be a special case to what torch.export made.
    """
    paths = next((found for folder in folders if (found := sorted(folder.glob(FILES)))), [])
    best: list[tuple[float, Batch]] = []
    for path in paths:
        largest, examples = _read(path, secret)
        values: dict[int, tuple[float, Batch]] = {}
        for name, example in examples.items():
            before = values.get(id(example), (0.0, example))[0]
            values[id(example)] = max(before, largest[name]), example
        best += values.values()
    best.sort(key=lambda entry: -entry[0])
    return [{key: torch.stack([value, value]) for key, value in example.items()} for _, example in best[:KEPT]]


def _read(path: Path, secret: bytes | None) -> tuple[dict[str, float], dict[str, Batch]]:
    content = kept.read(path, secret, _WHAT)
    size = int.from_bytes(content[:8], "little")  # of the header of a safetensors file, which is JSON
    rows = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["peaks"])
    examples: dict[str, Batch] = {}
    for key, value in load(content).items():
        number, _, name = key.partition("/")
        examples.setdefault(number, {})[name] = value
    return {n: value for n, (value, _) in rows.items()}, {n: examples[number] for n, (_, number) in rows.items()}
