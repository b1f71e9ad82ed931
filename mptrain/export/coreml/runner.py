"""A saved package, computed by the reference interpreter, as a function of named inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from mptrain.core.signature import Signature
from mptrain.export.facts import Facts
from mptrain.export.torch.texts import Texts
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import Interpreter
from mptrain.mil.padded import Padded


class Package:
    """Batches of any size and length up to the package's longest."""

    def __init__(self, path: Path | str, signature: Signature) -> None:
        self.interpreter = Interpreter(path)
        self._padded = Padded(self.interpreter, signature)

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        return self._padded(batch)

    def facts(self) -> Facts:
        return Facts.from_json(facts(self.interpreter.program))

    def close(self) -> None:
        del self.interpreter, self._padded


class CachedPackage:
    """With a key-value cache of `tokens` tokens in its states; texts go in piece by piece."""

    def __init__(self, path: Path | str, tokens: int) -> None:
        self.interpreter = Interpreter(path)
        self._texts = Texts(self.interpreter, tokens=tokens, max_length=tokens)

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        return self._texts(batch)

    def facts(self) -> Facts:
        return Facts.from_json(facts(self.interpreter.program))

    def close(self) -> None:
        del self.interpreter, self._texts
