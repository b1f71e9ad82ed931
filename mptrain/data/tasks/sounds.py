"""Sounds as float32 samples in [-1, 1], one channel: what a file holds, or numbers in a cell.

A file is read by soundfile where it is installed, else only wav, by scipy. Whole numbers are divided by their
full scale, channels are averaged. Neither reader says that a wav ends before its header does, so that is looked
at here. Numbers in a cell are samples, or {"array", "sampling_rate"} as `datasets` gives them; with two axes the
shorter one is that of the channels.
"""

from __future__ import annotations

import io
import math
import struct
import warnings

import numpy as np

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import hidden, reason, shown
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.media import digest, read_bytes

RATES = (100, 1_000_000)
"""samples a second that a sound may have"""
LOUDEST = 4.0
"""float sounds may exceed full scale, but not by the factor between whole numbers and fractions"""
_MOST_CHANNELS = 64
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)
"""of the data of a wav whose writer could not go back to its header"""


def digests(table: Table, field: str) -> list[str]:
    """sha256 of the content of every cell: the encoded file, or the samples and their rate."""
    found = []
    for row in range(len(table)):
        given = _numbers(table, field, row)
        if given is None:
            found.append(digest(read_bytes(table, field, row)))
        else:
            found.append(digest(given[0].tobytes(), b"" if given[1] is None else str(given[1]).encode()))
    return found


def read_sound(table: Table, field: str, row: int) -> tuple[np.ndarray, int | None]:
    """The sound in a cell: float32 samples [n] in [-1, 1], and its rate in Hz if it says one.

    Raises DataError naming the row for one that is broken, cut off, empty, not finite or not in that range.
    """
    place = table.place(field, row)
    found = _numbers(table, field, row)
    if found is None:
        content = read_bytes(table, field, row)
        try:
            found = _decode(content)
        except Exception as error:  # readers raise struct.error, RuntimeError, IndexError, MemoryError, …
            raise DataError(
                f"{place} is not a sound that can be read ({reason(error)}). Repair or drop it. Without"
                " the package soundfile only wav files are read: `pip install soundfile`, or convert it."
            ) from (None if hidden() else error)
    samples, rate = found
    samples = _one_channel(samples, place)
    if not samples.size:
        raise DataError(f"{place} is a sound without samples; drop it.")
    bad = samples.size - int(np.isfinite(samples).sum())
    if bad:
        raise DataError(f"{place} holds {bad} of {samples.size} samples that are NaN or infinite; repair or drop it.")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise DataError(
            f"{place} has samples up to {peak:g}, which are no fractions of full scale (-1 to 1). Divide them by the"
            " largest number of their kind: 32768 where they came from 16 bits."
        )
    if rate is not None and not RATES[0] <= rate <= RATES[1]:
        raise DataError(
            f"{place} says that it has {rate} samples a second; {RATES[0]} to {RATES[1]:,} are read. Correct the rate."
        )
    return samples, None if rate is None else round(rate)


def resampled(samples: np.ndarray, rate: int | None, wanted: int) -> np.ndarray:
    """float32 samples at `wanted` a second (polyphase, with a low-pass filter); of an unknown rate as they are."""
    if rate is None or rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(wanted, rate)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def _numbers(table: Table, field: str, row: int) -> tuple[np.ndarray, float | None] | None:
    """Samples given as numbers, plain or as {"array", "sampling_rate"}; None when the cell is not that."""
    value, rate = table[field][row], None
    if isinstance(value, dict) and "array" in value:
        value, rate = value["array"], value.get("sampling_rate")
    if not isinstance(value, list):
        return None
    place = table.place(field, row)
    try:
        samples = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{place} holds a list that is not one of numbers ({reason(error)}); correct the row.") from (
            None if hidden() else error
        )
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float)):
        raise DataError(f"{place} has the sampling_rate {shown(rate)}, which is no number; correct the row.")
    return samples, rate


def _one_channel(samples: np.ndarray, place: str) -> np.ndarray:
    """float32 [n]: the mean of the channels."""
    if samples.ndim == 2:
        channels = int(np.argmin(samples.shape))
        if samples.shape[channels] > _MOST_CHANNELS:
            raise DataError(
                f"{place} holds samples of shape {list(samples.shape)}, neither of whose axes can be that of channels;"
                " give one list of samples."
            )
        samples = samples.mean(axis=channels)
    if samples.ndim != 1:
        raise DataError(f"{place} holds samples with {samples.ndim} axes; give one list, or one for each channel.")
    return samples.astype(np.float32, copy=False)


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    """float samples [n] or [n, channels] and their rate."""
    _check_wav(content)
    try:
        import soundfile
    except ImportError:
        from scipy.io import wavfile

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of chunks it does not know; what matters, _check_wav has seen
            rate, samples = wavfile.read(io.BytesIO(content))
        if samples.dtype == np.uint8:  # 8-bit wav is unsigned around 128
            return (samples.astype(np.float32) - 128) / 128, rate
        if samples.dtype.kind == "i":
            return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min), rate
        return samples, rate
    return soundfile.read(io.BytesIO(content), dtype="float32")


def _check_wav(content: bytes) -> None:
    """Raise ValueError for a wav that ends before its header says."""
    if content[:4] not in (b"RIFF", b"RIFX") or content[8:12] != b"WAVE":
        return
    order, at = "<" if content[:4] == b"RIFF" else ">", 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], struct.unpack(f"{order}I", content[at + 4 : at + 8])[0]
        there = len(content) - at - 8
        if name == b"data":
            if size not in _UNKNOWN_SIZES and size > there:
                raise ValueError(f"its header says {size} bytes of samples, {there} are there")
            return
        at += 8 + size + size % 2
    raise ValueError("it has no samples: it ends before them")
