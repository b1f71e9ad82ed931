"""Images and sounds out of table cells: a path, bytes, {"bytes", "path"} or a row of a `datasets` table."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mptrain.core.errors import DataError
from mptrain.data.sources.read import Stored
from mptrain.data.sources.tables import Table, check_unicode


def read_bytes(table: Table, field: str, row: int) -> bytes:
    """The encoded file in a cell. Raises DataError naming the row and the absolute path that was tried."""
    cell = table[field][row]
    value = cell.read() if isinstance(cell, Stored) else cell
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{table.place(field, row)} holds {_short(cell)} where the path of a file is needed; correct the row or"
            f" set data.{field}."
        )
    check_unicode(value, table.place(field, row))
    path = Path(value).expanduser()
    if not path.is_absolute():
        path = (table.folder or Path()).absolute() / path
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{table.place(field, row)} names {value!r}, but {path} could not be read ({error.strerror}). Paths are"
            " relative to the folder of the data file."
        ) from error


def digests(table: Table, field: str) -> list[str]:
    """sha256 of the content of every cell."""
    found = []
    for row in range(len(table)):
        samples = _samples(table, field, row)
        content = read_bytes(table, field, row) if samples is None else samples[0].tobytes()
        found.append(hashlib.sha256(content).hexdigest())
    return found


def read_image(table: Table, field: str, row: int) -> Image.Image:
    """The picture in a cell, RGB."""
    try:
        return Image.open(io.BytesIO(read_bytes(table, field, row))).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"{table.place(field, row)} is not a picture that can be read ({error}). Repair or drop it."
        ) from error


def read_sound(table: Table, field: str, row: int) -> tuple[np.ndarray, int | None]:
    """The sound in a cell: float32 samples in [-1, 1], one channel (the mean), and its rate if it says one."""
    found = _samples(table, field, row)
    if found is not None:
        return found
    content = read_bytes(table, field, row)
    try:
        samples, rate = _decode(content)
    except (ValueError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{table.place(field, row)} is not a sound that can be read ({error}). Without the"
            " package soundfile only wav files are read: `pip install soundfile`, or convert it."
        ) from error
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    return samples.astype(np.float32), rate


def _samples(table: Table, field: str, row: int) -> tuple[np.ndarray, int | None] | None:
    """Samples given as numbers, plain or as {"array", "sampling_rate"}; None when the cell is not that."""
    cell, rate = table[field][row], None
    if isinstance(cell, dict) and "array" in cell:
        cell, rate = cell["array"], cell.get("sampling_rate")
    if not isinstance(cell, list):
        return None
    try:
        return np.asarray(cell, dtype=np.float32).reshape(-1), rate
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{table.place(field, row)} holds a list that is not one of numbers ({error}); correct the row."
        ) from error


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        from scipy.io import wavfile

        rate, samples = wavfile.read(io.BytesIO(content))
        if samples.dtype == np.uint8:  # 8-bit wav is unsigned around 128
            return (samples.astype(np.float32) - 128) / 128, rate
        if samples.dtype.kind == "i":
            return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min), rate
        return samples, rate
    return soundfile.read(io.BytesIO(content), dtype="float32")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
