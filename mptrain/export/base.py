"""The dynamic half of an export format: write a model, open what was written, say what is in it.

A format is one folder here with a class that has the methods of `Format`, one file in mptrain/recipe/exports with what
is known before anything heavy is imported (`ExportSpec`), and a line in the tables FORMATS and EXPORTS. The flow asks
these alone. tests/contract/test_formats.py holds every format to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import numpy as np
from torch import Tensor, nn

from mptrain.core.errors import ExportError
from mptrain.core.signature import Batch, Signature
from mptrain.export.facts import NOTHING, Facts
from mptrain.measure.throughput import Stream

Embeddings = Literal["fp32", "int8"]


@dataclass(frozen=True)
class Source:
    """What is exported, and all that a format may know of it.

    load: gives the torch model as `Format.torch` made it, in eval mode, float32, on the CPU; `model` is it, loaded
    once. signature: its inputs and outputs; a format keeps the free axes free where it can. example: inputs without
    targets, at least 2 examples. precision: of the entry's. embeddings: how a quantized model's are stored.
    quantized: whether the stage's model has fake quantizers of activations, also where `Format.torch` took them off.
    calibration: batches of training inputs, for what has to see real values; asked when they are needed, and never
    compared on. written: when the file exists, what `write` said of it.
    """

    load: Callable[[], nn.Module]
    signature: Signature
    example: Batch
    precision: str
    embeddings: Embeddings
    quantized: bool
    calibration: Callable[[], list[Batch]]
    written: Facts = NOTHING

    @cached_property
    def model(self) -> nn.Module:
        return self.load()


@dataclass(frozen=True)
class Written:
    """path: of the model's file or package. size_bytes: of the model alone. facts: what only the writer knows."""

    path: Path
    size_bytes: int
    facts: Facts = NOTHING


class Runner(Protocol):
    """An exported model as a function of inputs by name, for batches of any size and length that the format takes."""

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in the shapes of the torch model's. Inputs that the model does not have are dropped."""
        ...

    def facts(self) -> Facts:
        """Read from the file or the compiled model, never from what was asked for."""
        ...

    def close(self) -> None:
        """Free what it holds. Further calls are errors."""
        ...


class Format(Protocol):
    """Made from its entry in a recipe; imports its packages when a method needs them."""

    def torch(self, model: nn.Module, precision: str, embeddings: Embeddings) -> nn.Module:
        """The torch model that is written, and that the exported one is compared with. Raises UserError when model
        and precision do not fit."""
        ...

    def write(self, source: Source, folder: Path) -> Written:
        """Write the model's files, and no others, into a folder that exists and is empty. Raises ExportError."""
        ...

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        """path: that was written. threads: default all. Raises ExportError for a file that is not whole."""
        ...


def cannot_run(path: Path, runtime: str, inputs: Mapping[str, np.ndarray], error: Exception) -> ExportError:
    """For what a runtime raises while it computes, which is of many types."""
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
    return ExportError(
        f"{path.name}: {runtime} cannot run it on {shapes} (…{' '.join(str(error).split())[-300:]}). If other sizes"
        " run, the model computes for those alone."
    )


class Foreseeing(Format, Protocol):
    """A format whose spec says `foresees`."""

    def check(self, model: nn.Module, example: Batch, signature: Signature) -> None:
        """model: of the architecture, with any weights. Raises ExportError that lists all operations that the format
        lacks."""
        ...


def tried(format: Format, model: nn.Module, example: Batch, signature: Signature) -> None:
    """`check` of a format that has to convert to see what it lacks: in fp32, into a folder that is thrown away."""
    source = Source(lambda: model.eval(), signature, example, "fp32", "fp32", False, list)
    with TemporaryDirectory(prefix="mptrain-") as folder:
        format.write(source, Path(folder))


class Streaming(Format, Protocol):
    """A format whose spec says `streams`."""

    def stream(self, path: Path, source: Source, threads: int) -> Stream:
        """path: that was written. Raises ExportError for a file that is not whole."""
        ...
