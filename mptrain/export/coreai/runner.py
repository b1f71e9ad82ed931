"""Core AI assets executed by Core AI's own runtime on this host's CPU."""

from __future__ import annotations

import asyncio
import functools
import threading
import warnings
import weakref
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mptrain.core.errors import ExportError
from mptrain.export.base import cannot_run
from mptrain.export.coreai.asset import load
from mptrain.export.coreai.facts import FUNCTION, facts
from mptrain.export.facts import Facts
from mptrain.export.torch.texts import Texts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations inside these packages
    from coreai.runtime import NDArray


class Asset:
    """An asset as a function of named inputs, computed by Core AI's runtime on this host's CPU.

    The runtime chooses its threads itself. Usable where an event loop is already running (Jupyter):
    the asynchronous calls are made in a thread of their own. States of the asset, such as a key-value
    cache, start as zeros and stay between calls. `close` frees the model; so does the garbage collector.
    """

    execution = "Core AI's runtime on this host's CPU, not an Apple device"

    def __init__(self, asset: Path | str):
        self.asset = Path(asset)
        loaded = load(self.asset)
        stack = AsyncExitStack()
        try:
            model = _wait(stack.enter_async_context(loaded.executable()))
            self._function = model.load_function(FUNCTION)
        except Exception as error:
            _wait(stack.aclose())
            raise ExportError(f"Core AI could not load {self.asset}: {str(error).strip()[-600:]}") from error
        self.close = weakref.finalize(self, lambda: _wait(stack.aclose()))
        described = self._function.desc
        self.inputs = list(described.input_names)
        self.outputs = list(described.output_names)
        self._types = {name: np.dtype(described.input_descriptor(name).dtype) for name in self.inputs}
        self._shapes = {name: described.input_descriptor(name).shape for name in self.inputs}
        self.states = {name: described.state_descriptor(name).shape for name in described.state_names}
        self._state_types = {name: described.state_descriptor(name).dtype for name in described.state_names}
        self.reset()

    def reset(self) -> None:
        """Make the states zeros again."""
        self._state = {name: NDArray(np.zeros(shape, self._state_types[name])) for name, shape in self.states.items()}

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Takes torch tensors or arrays of any width; inputs that the asset lacks are dropped."""
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise ExportError(f"{self.asset} needs the inputs {self.inputs}, the batch lacks {missing}")
        arrays = {name: self._array(name, batch[name]) for name in self.inputs}
        try:
            results = _wait(self._function({name: NDArray(array) for name, array in arrays.items()}, self._state))
        except RuntimeError as error:
            raise cannot_run(self.asset, "Core AI's runtime", arrays, error) from error
        return {name: np.array(results[name].numpy()) for name in self.outputs}

    def _array(self, name: str, value: Tensor | np.ndarray) -> np.ndarray:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        expected = self._shapes[name]
        if array.ndim != len(expected) or any(e not in (s, -1, None) for e, s in zip(expected, array.shape)):
            shape = ["any" if size in (-1, None) else size for size in expected]
            raise ExportError(f"{self.asset}: input {name} is {list(array.shape)}, the asset was exported for {shape}")
        return np.ascontiguousarray(array, dtype=self._types[name])

    def facts(self) -> Facts:
        return facts(self.asset, self.execution)


class CachedAsset:
    """With a key-value cache of `tokens` tokens in its states; texts go in token by token."""

    def __init__(self, path: Path | str, tokens: int) -> None:
        self._asset = Asset(path)
        self._texts = Texts(self._asset, tokens=1, max_length=tokens)

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        return self._texts(batch)

    def facts(self) -> Facts:
        return self._asset.facts()

    def close(self) -> None:
        self._asset.close()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="coreai", daemon=True).start()
    return loop


def _wait(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(call, _loop()).result()
