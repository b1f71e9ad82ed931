"""A format as the target of a budget: models are really exported, to a folder that goes, and opened there.

What a budget measures is so what a variant will be: the same conversion, weights, quantizers and runtime.
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mptrain import recipe
from mptrain.compress import runtime
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.scopes import matches
from mptrain.core.hooks import is_quantized
from mptrain.core.host import thread_count
from mptrain.core.signature import Batch, probed
from mptrain.export.base import Runner, Source
from mptrain.export.formats import format_of
from mptrain.recipe.target import Target

log = logging.getLogger(__name__)


def opened(target: Target) -> runtime.Runtime:
    """The target that a recipe's stands for; torch, with a warning, where its runtime is not installed."""
    threads = thread_count(target.threads)
    try:
        target.export.check_installed()
    except ModuleNotFoundError:
        log.warning(
            "prune.keep: without %s, models are timed in torch; pip install 'mptrain[%s]'",
            target.export.title,
            target.export.extra,
        )
        return runtime.Torch(threads)
    return Exporting(target, threads)


class Exporting:
    """threads: of a call."""

    def __init__(self, target: Target, threads: int) -> None:
        self.target, self.threads = target, threads
        self.words = f"{target.export.title} {target.precision}, {runtime.count(threads)}"

    def compiled(self, model: nn.Module, example: Batch) -> runtime.Compiled:
        """Raises ExportError for a model that the format does not take."""
        target, how = self.target, format_of(self.target.export)
        example = {name: value.cpu() for name, value in example.items()}
        model = self._quantized(model, example)
        twice = {name: value.repeat_interleave(2, 0) for name, value in example.items()}
        made = how.torch(model, target.precision, target.embeddings)
        source = Source(
            lambda: made,
            probed(quantizers.plain(made), twice),
            twice,
            target.precision,
            target.embeddings,
            target.quantize is not None,
            lambda: [twice],
        )
        folder = TemporaryDirectory(prefix="mptrain-", ignore_cleanup_errors=True)
        try:
            written = how.write(source, Path(folder.name))
            runner = how.open(written.path, source, self.threads)
        except BaseException:
            folder.cleanup()
            raise
        return _Opened(runner, example, written.size_bytes, folder)

    def _quantized(self, model: nn.Module, example: Batch) -> nn.Module:
        """With the quantizers that it will have; where they stand and how fast they are depends on no value."""
        config: Any = self.target.quantize
        if config is None or is_quantized(model):
            return model
        names = [name for name, _ in model.named_modules()]
        given = quantizers.given(config)
        fitting = [pattern for pattern in given if any(matches(pattern, name) for name in names)]
        bits = {p: n for p, n in config.bits.items() if any(matches(p, name) for name in names)}
        changes: dict[str, Any] = {"ignore": fitting, "bits": bits}
        if isinstance(config, recipe.Ptq):
            changes["fast_bias_correction"] = False  # costs time here and none in the export
        return quantizers.quantize(model, config.model_copy(update=changes), [example])


class _Opened:
    def __init__(self, runner: Runner, example: Batch, size: int, folder: TemporaryDirectory) -> None:
        self.bytes = size
        self._runner, self._folder = runner, folder
        self._example = {name: value.numpy() for name, value in example.items()}

    def seconds(self) -> float:
        return runtime.seconds(lambda: self._runner(self._example))

    def close(self) -> None:
        self._runner.close()
        self._folder.cleanup()
