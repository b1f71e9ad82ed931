"""Damaged files of every kind that is read: case n damages one file of one kind in one way.

A file may still be read where the damage changes nothing that is used, or where nothing in it could tell (a
flipped bit of a weight). A shortened file always can.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from kit import report_sample, tiny
from kit.tiny_models import inputs
from kit.tiny_models import tiny as model_of
from PIL import Image
from scipy.io import wavfile

import mptrain
from benchmarks.soak.cases import Outcome, TooLong, command, failed, limited
from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import palettize, records, weight_only
from mptrain.core.disk import write_json
from mptrain.core.errors import MptrainError
from mptrain.data.sources.tables import Table, read_table
from mptrain.data.tasks.pictures import read_image
from mptrain.data.tasks.sounds import read_sound
from mptrain.flow.run_folder import check_identity
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe import Model, Palettize, Ptq, WeightOnly
from mptrain.train import checkpoint

WAYS = ("cut", "flip", "flips", "zeros", "swapped", "empty", "other", "doubled")


@dataclass(frozen=True)
class Kind:
    """file: what is damaged, below a copy of `folder`. use: reads it, and returns what was read.

    told: a cut shows. checked: it has checksums, so that a changed bit shows as well.
    """

    name: str
    folder: Path
    file: str
    use: Callable[[Path], Any]
    told: bool = True
    checked: bool = False


def kinds(folder: Path) -> list[Kind]:
    """Whole files of every kind, made below `folder`."""
    return [
        *_tables(folder / "tables"),
        *_media(folder / "media"),
        *_models(folder / "models"),
        *_runs(folder / "runs"),
        *_exports(folder / "exports"),
    ]


def run(kind: Kind, number: int, scratch: Path) -> Outcome:
    """Damage a copy and read it, in a child process: native code may crash."""
    draw = random.Random(f"input {kind.name} {number}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(kind.folder, scratch)
    way = draw.choice(WAYS)
    path = scratch / kind.file
    before = path.read_bytes()
    path.write_bytes(_damaged(draw, way, before))
    found = in_child(lambda: _digest(kind.use(scratch)))
    if found.kind != "read" or path.read_bytes() == before:
        return Outcome(found.kind, f"{way}: {found.said}", found.at)
    shows = (kind.told and way in ("cut", "empty")) or (kind.checked and way in ("flip", "flips", "zeros"))
    if shows and found.said != _expected(kind):
        return Outcome("silent", f"{way}: read as something else")
    return Outcome("read", way)


def undamaged(kind: Kind, scratch: Path) -> Outcome:
    """What reading a whole copy gives."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(kind.folder, scratch)
    return in_child(lambda: _digest(kind.use(scratch)))


_known: dict[str, str] = {}


def _expected(kind: Kind) -> str:
    if kind.name not in _known:
        _known[kind.name] = in_child(lambda: _digest(kind.use(kind.folder))).said
    return _known[kind.name]


def in_child(work: Callable[[], str]) -> Outcome:
    """read (said: what `work` gives), refused, traceback, timeout or crash."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            with limited():
                outcome = Outcome("read", work())
        except MptrainError as error:
            outcome = Outcome("refused", str(error)[:300])
        except BaseException as error:
            outcome = Outcome("timeout") if isinstance(error, TooLong) else failed(error)
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(outcome, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(content) if content else Outcome("crash", f"status {status}")


def _damaged(draw: random.Random, way: str, content: bytes) -> bytes:
    if way == "empty" or not content:
        return b""
    at = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 400))))
    changed = bytearray(content)
    if way == "cut":
        return content[:at]
    if way in ("flip", "flips"):
        for _ in range(1 if way == "flip" else 8):
            changed[draw.randrange(len(content)) if way == "flips" else at] ^= 1 << draw.randrange(8)
    elif way == "zeros":
        changed[at : at + 64] = bytes(min(64, len(content) - at))
    elif way == "swapped":
        return content[at:] + content[:at]
    elif way == "other":
        return draw.choice(
            (b"\x80\x04cos\nsystem\n.", b"PK\x03\x04", b"<html>404</html>", b"version https://git-lfs\n", b"[]")
        )
    elif way == "doubled":
        return content + content
    return bytes(changed)


def _digest(found: Any) -> str:
    return hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()


# -- the kinds


def _tables(folder: Path) -> list[Kind]:
    folder.mkdir(parents=True)
    rows = [(f"a good film {i}, they said", ("pos", "neg")[i % 2]) for i in range(60)]
    text = "".join(f'"{t}",{y}\n' for t, y in [("text", "label"), *rows]).encode()
    lines = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows).encode()
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [y for _, y in rows]}), table)
    files = {
        "csv": text,
        "csv.gz": gzip.compress(text),
        "jsonl": lines,
        "jsonl.bz2": bz2.compress(lines),
        "parquet": table.getvalue(),
        "txt": text,
    }
    found = []
    for ending, content in files.items():
        own = folder / ending
        own.mkdir()
        (own / f"data.{ending}").write_bytes(content)
        use = lambda at, ending=ending: read_table(str(at / f"data.{ending}"), "data.train").columns  # noqa: E731
        # plain text ends anywhere: a cut between two lines, or within a cell of the last, leaves a whole file
        packed = ending.endswith(("gz", "bz2"))
        told = ending not in ("csv", "jsonl", "txt")
        found.append(Kind(f"table {ending}", own, f"data.{ending}", use, told=told, checked=packed))
    return found


def _media(folder: Path) -> list[Kind]:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    pixels = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for form in ("png", "jpeg", "webp", "tiff", "bmp", "gif"):
        pixels.save(folder / f"a.{form}")
    wavfile.write(folder / "a.wav", 8000, (draw.normal(size=900) * 3000).astype(np.int16))

    def cell(at: Path, name: str, field: str) -> Table:
        return Table("list.csv", {field: [str(at / name)]})

    def picture(at: Path, name: str) -> Any:
        return read_image(cell(at, name, "image"), "image", 0).tobytes()

    found = []
    for form in ("png", "jpeg", "webp", "tiff", "bmp", "gif"):
        use = lambda at, name=f"a.{form}": picture(at, name)  # noqa: E731
        found.append(Kind(f"picture {form}", folder, f"a.{form}", use, checked=form == "png"))
    sound = lambda at: read_sound(cell(at, "a.wav", "audio"), "audio", 0)[0].tobytes()  # noqa: E731
    return [*found, Kind("sound wav", folder, "a.wav", sound)]


def _weights(model: torch.nn.Module) -> Any:
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in model.named_parameters()}


def _models(folder: Path) -> list[Kind]:
    folder.mkdir(parents=True)
    tiny.save_bert(folder / "plain" / "bert")
    spec = Model(path="x", task="text-classification")
    of = lambda at: spec.model_copy(update={"path": str(at / "bert")})  # noqa: E731
    plain = lambda at: _weights(load_model(of(at), ["a", "b"], seed=0))  # noqa: E731
    words = lambda at: load_processor(of(at))("a good film")["input_ids"]  # noqa: E731
    found = [
        Kind("config.json", folder / "plain", "bert/config.json", plain, told=False),
        Kind("model.safetensors", folder / "plain", "bert/model.safetensors", plain),
        Kind("tokenizer.json", folder / "plain", "bert/tokenizer.json", words),
        Kind("tokenizer_config.json", folder / "plain", "bert/tokenizer_config.json", words),
    ]
    int4, tables = model_of("gpt2"), model_of("opt")
    weight_only.compress(int4, WeightOnly(mode="weight_only", method="rtn", block_size=16))
    records.attach(tables, palettize.palettize(tables, Palettize(method="kmeans", bits=3, group_size=8)))
    quantized = quantizers.quantize(model_of("bert"), Ptq(mode="ptq"), [inputs("bert")])
    for name, model, files in (
        ("int4", int4, ("compressed.safetensors", "mptrain.safetensors", "config.json")),
        ("tables", tables, ("compressed.safetensors",)),
        ("int8", quantized, ("quantizers.json", "mptrain.safetensors")),
    ):
        mptrain.save(model, folder / name)
        use = lambda at: _weights(mptrain.load(at))  # noqa: E731
        found += [Kind(f"{name} {file}", folder / name, file, use, told=file != "config.json") for file in files]
    return found


def _runs(folder: Path) -> list[Kind]:
    identity, sealed, reported = (
        {"format": 3, "recipe": {"seed": 1, "name": "a"}},
        folder / "checkpoint",
        folder / "report",
    )
    for own in (folder / "run", sealed / "checkpoint-10", reported):
        own.mkdir(parents=True)
    write_json(folder / "run" / "run.json", identity)
    write_json(reported / "report.json", report_sample.report())
    checkpoint.save_weights(model_of("bert"), sealed / "checkpoint-10" / "model.safetensors")
    checkpoint.save_state({"step": 10, "moments": torch.ones(50)}, sealed / "checkpoint-10" / "state.safetensors")
    checkpoint.seal(sealed / "checkpoint-10", step=10)

    def resumed(at: Path) -> Any:
        if checkpoint.latest(at) is None:
            raise MptrainError("no whole checkpoint")
        return ""

    def printed(at: Path) -> Any:
        return _of_command(["report", str(at)])

    found = [
        Kind("run.json", folder / "run", "run.json", lambda at: check_identity(at, dict(identity))),
        Kind("report.json", reported, "report.json", printed),
    ]
    files = sorted(path.name for path in (sealed / "checkpoint-10").iterdir())
    checked = [
        Kind(f"checkpoint {f}", sealed, f"checkpoint-10/{f}", resumed, checked=f != "manifest.json") for f in files
    ]
    return found + checked


def _of_command(arguments: list[str]) -> str:
    found = command(arguments)
    if found.bad:
        raise RuntimeError(f"{found.kind} {found.said} at {found.at}")
    if found.kind != "exit 0":
        raise MptrainError(found.said)
    return ""


def _exports(folder: Path) -> list[Kind]:
    from mptrain.export.coreai.convert import export_coreai
    from mptrain.export.coreai.runner import Asset
    from mptrain.export.coreml.convert import export_coreml
    from mptrain.export.onnx import convert as onnx
    from mptrain.export.onnx.runner import Session
    from mptrain.export.openvino.runner import CompiledIr
    from mptrain.export.openvino.write import export_openvino

    folder.mkdir(parents=True)
    model, batch = model_of("gpt2", use_cache=False, n_positions=128), inputs("gpt2")
    export_openvino(model, batch, folder / "ov", precision="fp32")
    package = export_coreml(model, batch, folder / "ml").package
    inner = [path.relative_to(folder / "ml") for path in sorted(package.rglob("*")) if path.is_file()]
    ran = lambda at: CompiledIr(at / "openvino_model.xml")(batch)["logits"].tobytes()  # noqa: E731

    def verified(at: Path) -> Any:
        return _of_command(["verify", str(at / package.name)])

    found = [
        Kind(f"openvino {file}", folder / "ov", file, ran) for file in ("openvino_model.xml", "openvino_model.bin")
    ]
    found += [Kind(f"core ml {file.name}", folder / "ml", str(file), verified) for file in inner]
    (folder / "onnx").mkdir()
    onnx.write(model, batch, folder / "onnx")
    found.append(
        Kind("onnx", folder / "onnx", "model.onnx", lambda at: Session(at / "model.onnx")(batch)["logits"].tobytes())
    )
    asset = export_coreai(model, batch, folder / "ai").asset
    opened = lambda at: Asset(at / asset.name)(batch)["logits"].tobytes()  # noqa: E731
    inner = [path.relative_to(folder / "ai") for path in sorted(asset.rglob("*")) if path.is_file()]
    return found + [Kind(f"core ai {file.name}", folder / "ai", str(file), opened) for file in inner]
