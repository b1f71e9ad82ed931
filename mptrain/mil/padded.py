"""A package of fixed or enumerated shapes as a function of batches of any size and length up to its longest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mptrain.core.errors import UserError
from mptrain.core.signature import MASK, Signature
from mptrain.mil.interpreter import Interpreter
from mptrain.mil.program import as_tensor

LENGTH = 1  # the axis of a text's tokens


class Padded:
    """Cuts a batch into pieces that the package takes and pads them as an app would: rows repeated, tokens masked.

    signature: of the torch model: which axes are a length. Padding in length needs a mask; outputs per token lose
    what was padded.
    """

    def __init__(self, interpreter: Interpreter, signature: Signature):
        self.interpreter, self.signature = interpreter, signature

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        program = self.interpreter.program
        values = {f.name: as_tensor(batch[f.name]) for f in program.inputs if f.name in batch}
        if not values or all(f.accepts(tuple(values[f.name].shape)) for f in program.inputs if f.name in values):
            return self.interpreter(values)
        shape = tuple(next(iter(values.values())).shape)
        rows, size = self._sizes(shape)
        if size != shape[LENGTH] and not any(name.endswith(MASK) for name in values):
            raise UserError(
                f"{self.interpreter.package}: a length of {shape[LENGTH]} needs padding to {size}, and the package"
                " has no input attention_mask; give inputs of its length, or export with flexible shapes"
            )
        parts = []
        for first in range(0, shape[0], rows):
            piece = {
                name: self._padded(name, value[first : first + rows], rows, size) for name, value in values.items()
            }
            found = self.interpreter(piece)
            kept = min(rows, shape[0] - first)
            parts.append({name: self._cut(name, value, kept, shape[LENGTH]) for name, value in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows of a piece, length): of the package's sizes the shortest that holds the batch's length."""
        feature = self.interpreter.program.inputs[0]
        if feature.shapes is None:
            (low, high), lengths = feature.bounds[0], feature.bounds[1:]
            rows = min(max(shape[0], low), high)
            size = max(shape[LENGTH], lengths[0][0]) if lengths else 0
            fits = not lengths or size <= lengths[0][1]
        else:
            long_enough = [s for s in feature.shapes if s[LENGTH] >= shape[LENGTH]]
            fits = bool(long_enough)
            rows, size = min(long_enough, key=lambda s: (s[LENGTH], -s[0]))[:2] if fits else (1, 0)
        if not fits:
            raise UserError(f"{self.interpreter.package}: inputs of shape {list(shape)} are too long for {feature}")
        return rows, size

    def _padded(self, name: str, value: Tensor, rows: int, size: int) -> Tensor:
        if LENGTH in self.signature.input(name).free and value.shape[LENGTH] < size:
            value = F.pad(value, (0, 0) * (value.dim() - 1 - LENGTH) + (0, size - value.shape[LENGTH]))
        if len(value) < rows:
            value = torch.cat([value, value[:1].expand(rows - len(value), *value.shape[1:])])
        return value

    def _cut(self, name: str, value: np.ndarray, rows: int, length: int) -> np.ndarray:
        lengths = self.signature.lengths()[:1]
        per_token = bool(lengths) and self.signature.output(name).axes[LENGTH : LENGTH + 1] == tuple(lengths)
        return value[:rows, :length] if per_token else value[:rows]
