"""Pictures of every kind arrive as their pixels mean, or are refused by their row before any training."""

import base64
import io
import os

import numpy as np
import pytest
from datasets import Dataset, Features, Image, disable_progress_bars
from PIL import Image as Pictures
from transformers.image_utils import load_image

from mptrain.core.errors import DataError
from mptrain.data.sources.places import OnDisk
from mptrain.data.sources.read import read_source
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.pictures import check, read_image
from mptrain.recipe import Data

disable_progress_bars()

RAMP = np.linspace(0, 1, 256)[None].repeat(3, 0)


def encoded(picture, form="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def cells(*contents):
    return Table("list.csv", {"image": list(contents)})


def read(content):
    return np.asarray(read_image(cells(content), "image", 0))


def piped(content):
    """As transformers' pipelines read it."""
    return np.asarray(load_image(base64.b64encode(content).decode()))


def turned(orientation, form="JPEG"):
    """Red on the left, blue on the right, as stored."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 250
    picture = Pictures.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    return encoded(picture, form, exif=exif)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_datasets_and_pipelines_turn_it(orientation, form):
    content = turned(orientation, form)
    found = read_image(cells(content), "image", 0)
    assert found.size == ((16, 8) if orientation < 5 else (8, 16))
    np.testing.assert_array_equal(np.asarray(found), piped(content))
    theirs = Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, features=Features({"image": Image()}))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(theirs[0]["image"].convert("RGB")))


SIXTEEN = {
    "png": encoded(Pictures.fromarray((RAMP * 65535).round().astype(np.uint16))),
    "tiff": encoded(Pictures.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
    "big-endian tiff": encoded(
        Pictures.frombuffer("I;16B", (256, 3), (RAMP * 65535).round().astype(">u2").tobytes(), "raw", "I;16B", 0, 1),
        "TIFF",
    ),
    "jpeg 2000": encoded(Pictures.fromarray((RAMP * 65535).round().astype(np.uint16)), "JPEG2000"),
    "portable grey map": b"P5 256 3 65535\n" + (RAMP * 65535).round().astype(">u2").tobytes(),
}


@pytest.mark.parametrize("form", SIXTEEN)
def test_sixteen_bits_are_scaled_not_cut(form):
    found = read(SIXTEEN[form])
    wanted = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 0).repeat(3, 2)
    np.testing.assert_array_equal(found, wanted)


def test_a_deep_picture_is_turned_as_well():
    picture = Pictures.fromarray((RAMP * 65535).round().astype(np.uint16))
    exif = picture.getexif()
    exif[0x0112] = 6
    found = read(encoded(picture, exif=exif))
    assert found.shape == (256, 3, 3)
    assert found[:, 0, 0].tolist() == list(range(256))


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_pixels_without_a_white_are_refused_by_name(kind):
    content = encoded(Pictures.fromarray((RAMP * 1000).astype(kind)), "TIFF")
    says = {"int32": "whole numbers of 32 bits", "float32": "floating-point numbers"}[kind]
    with pytest.raises(DataError, match=rf"data.image: row 2 of list.csv has {says} for pixels.*8 or 16 bits"):
        read_image(cells(SIXTEEN["png"], content), "image", 1)


def test_transparency_palettes_cmyk_and_bits_become_rgb():
    colours = Pictures.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    clear = colours.copy()
    clear.putalpha(0)
    kinds = {
        "alpha": encoded(clear),
        "grey alpha": encoded(colours.convert("LA")),
        "palette": encoded(colours.quantize(16), transparency=0),
        "cmyk": encoded(colours.convert("CMYK"), "TIFF"),
        "ycc": encoded(colours.convert("YCbCr"), "TIFF"),
        "bits": encoded(colours.convert("1")),
        "gif": encoded(colours, "GIF", save_all=True, append_images=[Pictures.new("RGB", (7, 5))]),
    }
    for kind, content in kinds.items():
        np.testing.assert_array_equal(read(content), piped(content), kind)
    np.testing.assert_array_equal(read(kinds["alpha"]), np.asarray(colours))


def test_a_picture_that_would_fill_the_memory_is_refused():
    content = encoded(Pictures.new("1", (20_000, 20_000)))
    assert len(content) < 100_000
    with pytest.raises(DataError, match=r"data.image: row 1 of list.csv is a picture of more than 178,956,970 pixels"):
        read(content)


def test_damage_is_found_wherever_it_is_by_decoding_once():
    draw = np.random.default_rng(0)
    whole = encoded(Pictures.fromarray(draw.integers(0, 255, (24, 24, 3), dtype=np.uint8)))
    unseen = 0
    for cut in range(0, len(whole) - 12, 37):  # the last chunk of a PNG is empty
        with pytest.raises(DataError, match=r"data.image: row 2 of list.csv is not a picture"):
            check(cells(whole, whole[:cut]), "image", "test")
    for at in range(0, len(whole), 23):
        content = bytearray(whole)
        content[at] ^= 1 << int(draw.integers(8))
        try:
            pixels = read(bytes(content))
        except DataError:
            continue
        unseen += 1
        np.testing.assert_array_equal(pixels, read(whole))
    assert unseen < 5


def test_check_names_the_first_bad_row_of_many():
    good = turned(1)
    rows = [good] * 40
    rows[11], rows[30] = good[:50], b""
    with pytest.raises(DataError, match=r"row 12 of list.csv is not a picture"):
        check(cells(*rows), "image", "train")


def test_a_row_that_names_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "which is no file"), ("a\0b", "could not be read"), ("~nobody-here/x", "could not")):
        table = cells(name)
        table.folder = OnDisk(tmp_path)
        with pytest.raises(DataError, match=says):
            read_image(table, "image", 0)


def test_pictures_of_a_folder_of_datasets_are_turned(tmp_path):
    one = Dataset.from_dict({"image": [{"bytes": turned(6), "path": None}]}, features=Features({"image": Image()}))
    one.save_to_disk(str(tmp_path / "d"))
    table = read_source(Data(source=str(tmp_path / "d")), ["image"]).tables["train"]
    assert read_image(table, "image", 0).size == (8, 16)
