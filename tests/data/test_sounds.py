"""Sounds of every kind arrive as their samples mean, or are refused by their row before any training."""

import io

import numpy as np
import pytest
from scipy.io import wavfile

from mptrain.core.errors import DataError
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.sounds import digests, read_sound

WAVE = np.sin(np.arange(900) / 9).astype(np.float32) * 0.8


def cells(*contents):
    return Table("list.csv", {"audio": list(contents)})


def wav(samples, rate=8000):
    stream = io.BytesIO()
    wavfile.write(stream, rate, samples)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32", "float64"])
def test_every_width_is_scaled_to_full_scale(kind):
    scale = {"uint8": 127, "int16": 32767, "int32": 2**31 - 1}.get(kind, 1)
    samples = (WAVE.astype(np.float64) * scale + (128 if kind == "uint8" else 0)).astype(kind)
    found, rate = read_sound(cells(wav(samples)), "audio", 0)
    assert (found.dtype, rate) == (np.float32, 8000)
    np.testing.assert_allclose(found, WAVE, atol=2 / 128 if kind == "uint8" else 1e-4)


def test_channels_are_averaged_whichever_axis_they_are_on():
    both = np.stack([WAVE, -0.5 * WAVE])
    wanted = WAVE * 0.25
    for given in (wav(both.T.copy()), both.tolist(), both.T.tolist(), {"array": both.tolist(), "sampling_rate": 8000}):
        np.testing.assert_allclose(read_sound(cells(given), "audio", 0)[0], wanted, atol=1e-6)
    with pytest.raises(DataError, match=r"shape \[900, 900\], neither of whose axes"):
        read_sound(cells(np.zeros((900, 900)).tolist()), "audio", 0)
    with pytest.raises(DataError, match="samples with 3 axes"):
        read_sound(cells([[[0.1]]]), "audio", 0)


def test_a_wav_that_ends_before_its_header_says_so_is_refused():
    whole = wav((WAVE * 32767).astype(np.int16))
    for cut in (10, 43, 44, 600, len(whole) - 2):
        with pytest.raises(DataError, match=r"data.audio: row 2 of list.csv is not a sound that can be read"):
            read_sound(cells(whole, whole[:cut]), "audio", 1)
    endless = bytearray(whole)
    at = whole.index(b"data") + 4
    endless[at : at + 4] = b"\xff\xff\xff\xff"  # written to a pipe
    np.testing.assert_array_equal(
        read_sound(cells(bytes(endless)), "audio", 0)[0], read_sound(cells(whole), "audio", 0)[0]
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wav(np.zeros(0, np.int16)), "without samples"),
        ([], "without samples"),
        (wav(np.where(np.arange(900) == 7, np.nan, WAVE).astype(np.float32)), "1 of 900 samples that are NaN"),
        ([0.1, float("inf")], "1 of 2 samples that are NaN or infinite"),
        ((WAVE * 32767).round().tolist(), "samples up to 262.*no fractions of full scale.*32768"),
        (wav((WAVE * 32767).astype(np.float32)), "no fractions of full scale"),
        ({"array": WAVE.tolist(), "sampling_rate": 0}, "says that it has 0 samples a second"),
        ({"array": WAVE.tolist(), "sampling_rate": float("nan")}, "says that it has nan samples a second"),
        ({"array": WAVE.tolist(), "sampling_rate": 2**31}, "says that it has 2147483648 samples a second"),
        ({"array": WAVE.tolist(), "sampling_rate": "8 kHz"}, "sampling_rate '8 kHz', which is no number"),
        (["a", "b"], "not one of numbers"),
        (b"no sound", "is not a sound that can be read"),
        (b"", "is not a sound that can be read"),
        (None, "holds None where the path"),
    ],
)
def test_what_is_no_sound_names_its_row(content, says):
    with pytest.raises(DataError, match=rf"data.audio: row 2 of list.csv .*{says}"):
        read_sound(cells(WAVE.tolist(), content), "audio", 1)


def test_the_same_samples_at_another_rate_are_another_sound():
    one, other = ({"array": WAVE.tolist(), "sampling_rate": rate} for rate in (8000, 16000))
    first, second, third = digests(cells(one, other, dict(one)), "audio")
    assert first == third != second


def test_damaged_files_never_raise_anything_else():
    whole, draw = wav((WAVE * 32767).astype(np.int16)), np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        content[int(draw.integers(44))] ^= 1 << int(draw.integers(8))
        try:
            samples, _ = read_sound(cells(bytes(content)), "audio", 0)
        except DataError:
            continue
        assert samples.dtype == np.float32 and np.isfinite(samples).all()
