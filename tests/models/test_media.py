"""Folders of pictures and sounds as the inputs of `mptrain export` and `mptrain inspect`."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
import transformers as t
from kit.tiny_models import tiny
from PIL import Image

from mptrain.cli import main
from mptrain.core.errors import DataError, UserError
from mptrain.models.media import LONGEST_S, from_folder

SOUND = t.Wav2Vec2FeatureExtractor(sampling_rate=100, return_attention_mask=True)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(12):
        place = folder / "inner" if number % 2 else folder
        size = (20 + number, 30, 3)
        Image.fromarray(draw.integers(0, 255, size, dtype=np.uint8)).save(place / f"{number}.PNG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def write_sound(path, seconds, rate):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(np.sin(np.arange(int(seconds * rate))).astype("<i2").tobytes())


def test_pictures_of_any_size_come_as_the_processor_makes_them(pictures):
    processor = t.ViTImageProcessorPil(size={"height": 16, "width": 16})
    batches = from_folder(pictures, "image", processor, 10, 8)
    assert [tuple(b["pixel_values"].shape) for b in batches] == [(8, 3, 16, 16), (2, 3, 16, 16)]
    again = from_folder(pictures, "image", processor, 10, 8)
    assert batches[0]["pixel_values"].equal(again[0]["pixel_values"])


def test_what_cannot_be_read_is_named(pictures, tmp_path):
    processor = t.ViTImageProcessorPil(size={"height": 16, "width": 16})
    (pictures / "broken.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"--data: .*broken\.png is not a picture that can be read"):
        from_folder(pictures, "image", processor, 13, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no pictures \(\.bmp, "):
        from_folder(tmp_path / "empty", "image", processor, 13, 8)
    with pytest.raises(UserError, match=r"makes pictures of 13 sizes|makes pictures of \d+ sizes"):
        from_folder(pictures / "inner", "image", t.ViTImageProcessorPil(do_resize=False), 13, 8)


def test_sounds_are_resampled_cut_and_padded(tmp_path):
    write_sound(tmp_path / "short.wav", 1, 200)
    write_sound(tmp_path / "long.wav", LONGEST_S + 5, 100)
    (batch,) = from_folder(tmp_path, "audio", SOUND, 8, 8)
    assert batch["input_values"].shape == (2, LONGEST_S * 100)
    assert batch["attention_mask"].sum(1).tolist() == [LONGEST_S * 100, 100]


def test_export_compares_on_the_pictures_of_a_folder(pictures, tmp_path, capsys):
    tiny("vit").save_pretrained(tmp_path / "vit")
    t.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    words = ["export", str(tmp_path / "vit"), "--data", str(pictures), "--samples", "6", "--precision", "int8"]
    status = main([*words, "--to", str(tmp_path / "ov"), "--json", str(tmp_path / "facts.json")])
    assert status in (0, 3), capsys.readouterr().err  # 3: random weights may decide otherwise in int8
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["inputs"] == "the files of pictures" and facts["parity"]["examples"] >= 6
    assert facts["compressed"]["calibrated_on"] > 0
    assert main(["export", str(tmp_path / "vit"), "--data", str(tmp_path / "facts.json"), "--to", "no"]) == 2
    assert "give a folder of pictures, or a recipe" in capsys.readouterr().err
