"""A run on encrypted data leaves nothing of it behind: no text, no token ids, no hash of a text alone, no key."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from kit import sealed, tiny
from kit.jobs import kill_at, run
from kit.processes import launched, python

from mptrain.cli import main
from mptrain.data.sealed.vault import shard_name
from mptrain.data.sources.read import read_source
from mptrain.recipe import Data
from mptrain.train.peaks import batches

pytest.importorskip("cryptography")

CANARIES = (
    "good plot cast so awful film not the very great was poor cast a is fine",
    "bad the the film so so not poor was plot awful cast very is a great film",
)


FORMATS = (("onnx", {}), ("coreml", {"shapes": {"length": [16, 48]}}), ("coreai", {}))
"""beside OpenVINO; all are traced with the longest training examples, which the canaries are"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty machine, as far as a run can tell: its home, caches and temporary files are below one folder."""
    for name in ("home", "tmp", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache" / "hf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(sealed.VARIABLE, sealed.KEY.hex())
    return tmp_path


def recipe(place: Path, private: bool = True, formats: Sequence[tuple[str, dict]] = ()) -> Path:
    """fp16 exports too, for which training keeps the examples with the largest activations."""
    inputs = place / "inputs"
    inputs.mkdir(exist_ok=True)
    described = tiny.jpqd(inputs)
    with (inputs / "reviews.csv").open("a", newline="") as stream:
        csv.writer(stream).writerows((text, "fresh", f"canary {i}") for i, text in enumerate(CANARIES))
    described["data"]["max_length"] = 48
    for stage in described["stages"]:
        stage["train"] |= {"epochs": 2, "checkpoint_steps": 5}
    described["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "jpqd"], "precision": ["fp32", "int8"]},
        {"id": "half", "format": "openvino", "of": ["dense"], "precision": ["fp16"]},
        *({"id": format, "format": format, "of": ["dense"], "precision": ["fp16"], **more} for format, more in formats),
    ]
    described["gates"] = {"fused_attention": None}
    described["output"]["dir"] = str(place / "run")
    if private:
        described["data"] |= {"train": str(sealed.encrypted(inputs / "reviews.csv")), "key": sealed.WHERE}
        (inputs / "reviews.csv").unlink()
    return tiny.write(described, place / "recipe.yaml")


def kept_texts(place: Path) -> list[str]:
    """Of the examples that the run keeps for its fp16 export, four."""
    data = yaml.safe_load((place / "recipe.yaml").read_text())["data"]
    source = read_source(Data(train=data["train"], key=data.get("key")), [])
    found = batches(sorted((place / "run" / "stages" / "dense").iterdir()), source.secret)
    rows = [batch["input_ids"][0].tolist() for batch in found]
    words = [" ".join(tiny.WORDS[i - len(tiny.SPECIAL)] for i in row if i >= len(tiny.SPECIAL)) for row in rows]
    return [text for text in words if len(text.split()) >= 12][:4]


def traces(texts: Sequence[str]) -> dict[str, list[bytes]]:
    """What may not be found, by what it is."""
    found: dict[str, list[bytes]] = {"text": [], "ids": [], "hash": [], "key": [sealed.KEY, sealed.KEY.hex().encode()]}
    tokenizer = tiny.tokenizer()
    for text in texts:
        middle = " ".join(text.split()[2:10])
        found["text"] += [middle.encode(), middle.encode("utf-16-le")]
        whole = tokenizer(text)["input_ids"]
        part = whole[3:11]
        found["ids"] += [np.asarray(part, kind).tobytes() for kind in (np.int64, np.int32, np.int16, np.float32)]
        found["ids"] += [joint.join(map(str, part)).encode() for joint in (", ", ",", " ", ",\n ", "\n")]
        for ids in (whole, whole[1:-1]):
            arrays = [np.asarray(ids, kind).tobytes() for kind in (np.int64, np.int32)]
            found["hash"] += _digests(*arrays, json.dumps(ids).encode())
        found["hash"] += _digests(text.encode(), json.dumps([text]).encode(), json.dumps(text).encode())
    return found


def _digests(*contents: bytes) -> Iterator[bytes]:
    for content, name in itertools.product(contents, ("md5", "sha1", "sha256", "blake2b")):
        digest = hashlib.new(name, content)
        yield from (digest.digest()[:16], digest.hexdigest()[:16].encode())


def searched(place: Path) -> Iterator[tuple[str, bytes]]:
    """Every file that the run can have written, shared memory and names included."""
    shared = Path("/dev/shm")
    for top in (place, shared) if shared.is_dir() else (place,):
        for path in top.rglob("*"):
            if not path.is_file():
                continue
            try:
                yield str(path), str(path).encode() + path.read_bytes()
            except OSError:  # of another process, gone by now
                continue


def found_in(place: Path, *more: str) -> set[str]:
    """Traces of the canaries, and of texts that the run is known to keep."""
    wanted = traces([*CANARIES, *more])
    return {
        f"{what} in {path}"
        for path, content in searched(place)
        for what, patterns in wanted.items()
        if any(pattern in content for pattern in patterns)
    }


@pytest.mark.long
def test_in_clear_the_canaries_are_found(place):
    """Else the tests below would say nothing: the kept examples hold token ids."""
    run(recipe(place, private=False))
    kept = kept_texts(place)
    assert kept and any("peaks" in line and line.startswith("ids") for line in found_in(place / "run", *kept))
    assert any(line.startswith("text in") and "reviews.csv" in line for line in found_in(place))


@pytest.mark.long
def test_a_run_killed_and_continued_leaves_nothing_of_its_data(place):
    path = recipe(place)
    assert kill_at(path, place / "run", "stages/dense/*/checkpoint-*/trainer_state.json") == -9
    kept = kept_texts(place)
    assert kept and not found_in(place, *kept)
    done = python("-m", "mptrain", "recipe", str(path), cwd=place, output=place)
    assert done.status == 0, done.stderr[-3000:]
    kept = kept_texts(place)
    assert kept and not found_in(place, *kept)
    written = (place / "run" / "report.json").read_text() + (place / "run" / "run.json").read_text()
    assert sealed.VARIABLE not in written and '"fp16"' in written


@pytest.mark.long
def test_two_processes_leave_nothing_of_their_data(place):
    done = launched("-m", "mptrain", "recipe", str(recipe(place, formats=FORMATS)), count=2, cwd=place, output=place)
    assert done.status == 0, done.stderr[-3000:]
    kept = kept_texts(place)
    assert len(list((place / "run").rglob("peaks-*"))) >= 2 and kept and not found_in(place, *kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: os.truncate(root / shard_name(0), 300), "shard-00000.sealed is cut off"),
        (lambda root: (root / shard_name(0)).unlink(), "shard-00000.sealed is missing"),
        (lambda root: os.environ.update({sealed.VARIABLE: "00" * 32}), "not the key that"),
        (lambda root: os.environ.update({sealed.VARIABLE: "00"}), "holds no key (2 bytes"),
        (lambda root: os.environ.pop(sealed.VARIABLE), "is not set"),
    ],
)
def test_what_does_not_open_is_one_paragraph_and_nothing_is_trained(place, damage, message):
    path = recipe(place)
    damage(Path(yaml.safe_load(path.read_text())["data"]["train"]))
    said = run(path, check=2).stderr
    assert message in said and len([line for line in said.splitlines() if line.startswith("mptrain: ")]) == 2
    assert not list((place / "run").glob("stages/*")) and not (place / "run" / "run.json").exists()


@pytest.mark.long
def test_the_bundled_recipe_runs_on_data_that_the_documented_command_encrypts(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "keys" / "film-reviews.key").write_text(os.urandom(32).hex() + "\n")
    monkeypatch.chdir(tmp_path / "work")
    key = str(tmp_path / "keys" / "film-reviews.key")
    where = "reviews/film-reviews.sealed"
    assert main(["data", "encrypt", "packaged:film-reviews", where, "--key-file", key]) == 0
    run("encrypted-sst", "--set", "preset=tiny", "--set", f"data.key.file={key}")
    report = json.loads((tmp_path / "work" / "runs" / "encrypted-sst" / "report.json").read_text())
    assert [v["id"] for v in report["variants"]] == ["baseline_fp32", "qat_int8"] and key not in json.dumps(report)
    assert report["data"]["groups"]["column"] == "film" and report["data"]["groups"]["crossing"] == 0
