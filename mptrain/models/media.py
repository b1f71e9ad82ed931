"""A folder of pictures or sounds as inputs of a model, prepared by the model's own processor as for training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mptrain.core.errors import UserError
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import Batch
from mptrain.data.tasks.pictures import read_image
from mptrain.data.tasks.sounds import read_sound, resampled

LONGEST_S = 10
"""seconds of a sound"""


@dataclass(frozen=True)
class Medium:
    """endings: of the files' names. batch: (files, processor) to the inputs of a model."""

    what: str
    endings: frozenset[str]
    batch: Callable[[Sequence[_File], Any], Batch]


class _File(Table):
    """A table of one file, which messages call by its name."""

    def place(self, field: str, row: int) -> str:
        return f"--data: {self.where}"


def _pictures(files: Sequence[_File], processor: Any) -> Batch:
    found = [processor(images=read_image(file, "file", 0), return_tensors="np")["pixel_values"][0] for file in files]
    sizes = {value.shape for value in found}
    if len(sizes) > 1:
        raise UserError(
            f"--data: the model's image processor makes pictures of {len(sizes)} sizes of {files[0].where} and others,"
            " which make no batch; give pictures of one size."
        )
    return {"pixel_values": torch.from_numpy(np.stack(found)).float()}


def _sounds(files: Sequence[_File], processor: Any) -> Batch:
    wanted = processor.sampling_rate
    waves = [resampled(*read_sound(file, "file", 0), wanted)[: LONGEST_S * wanted] for file in files]
    found = processor(waves, sampling_rate=wanted, padding=True, return_tensors="pt")
    return {name: found[name] for name in processor.model_input_names if name in found}


MEDIA = {
    "image": Medium("pictures", frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .ppm .pgm".split()), _pictures),
    "audio": Medium("sounds", frozenset(".wav .flac .ogg .mp3".split()), _sounds),
}
"""by the processor of a task"""


def from_folder(folder: Path, processor: str, prepare: Any, samples: int, batch_size: int) -> list[Batch]:
    """Batches of `samples` files drawn by a fixed seed, in folders below it too; sounds are cut at LONGEST_S.

    processor: of the task. prepare: the model's.

    Raises UserError for a folder without such files, DataError that names a file that cannot be read.
    """
    medium = MEDIA[processor]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in medium.endings and file.is_file())
    if not files:
        raise UserError(
            f"--data: {folder} holds no {medium.what} ({', '.join(sorted(medium.endings))}); give another folder, or a"
            " recipe, whose `data:` is then used."
        )
    if prepare is None:
        raise UserError(f"--data: the model comes without the processor that prepares {medium.what}; copy it there.")
    chosen = sorted(random.Random(0).sample(files, min(samples, len(files))))
    rows = [_File(str(file), {"file": [str(file.absolute())]}) for file in chosen]
    return [medium.batch(rows[start : start + batch_size], prepare) for start in range(0, len(rows), batch_size)]
