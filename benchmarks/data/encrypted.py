"""What reading encrypted data costs: the same file or folder encrypted, over in clear.

    python -m benchmarks.data.encrypted --json benchmarks/results/encrypted.json

text: 3,000 of the packaged film reviews from a csv to encoded examples, as before a training. pictures, sounds: an
epoch of examples as a network gets them (read, decoded, processed, collated), from a folder of JPEG files of 224
pixels or of wav files of a second. training: the same texts and an epoch of MiniLM on 64 of them. bytes: 64 MiB read
and nothing done with them, the one row in which decryption is not beside other work.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from scipy.io import wavfile

from benchmarks.kit.paired import compare, markdown, write
from mptrain.data.load import load_data
from mptrain.data.sealed import write as sealing
from mptrain.data.sealed.vault import Vault
from mptrain.data.sources.film_reviews import read_film_reviews
from mptrain.data.sources.packaged import fetch
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe import Data, Model

KEY, VARIABLE = os.urandom(32), "MPTRAIN_BENCHMARK_KEY"
CIPHERS = ("aes-256-gcm", "chacha20-poly1305")
FILES, REVIEWS = 96, 3000
Way = Callable[[], Any]


def reviews(folder: Path) -> Path:
    table, _ = read_film_reviews(fetch("packaged:film-reviews"))
    with (folder / "reviews.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "film"])
        writer.writerows(list(zip(table["text"], table["label"], table["film"]))[:REVIEWS])
    return folder / "reviews.csv"


def media(folder: Path, save: Callable[[Path, np.random.Generator], None], field: str, ending: str) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = [[field, "label"]]
    for number in range(FILES):
        save(folder / f"{number}{ending}", draw)
        rows.append([f"{number}{ending}", str(number % 2)])
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def picture(path: Path, draw: np.random.Generator) -> None:
    small = Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8))
    small.resize((224, 224), Image.Resampling.BICUBIC).save(path, quality=90)


def sound(path: Path, draw: np.random.Generator) -> None:
    wavfile.write(path, 16_000, (3000 * draw.standard_normal(16_000)).astype(np.int16))


def epoch(task: str, processor: Any, fields: dict[str, Any]) -> Way:
    data = load_data(Data(**fields), task, processor, seed=0)

    def work() -> None:
        for start in range(0, len(data.train), 32):
            data.collate([data.train[i] for i in range(start, min(start + 32, len(data.train)))])

    return work


def loading(processor: Any, spec: Model, fields: dict[str, Any]) -> Way:
    return lambda: load_data(Data(max_length=64, **fields), spec.task, processor, seed=0)


def training(processor: Any, spec: Model, fields: dict[str, Any]) -> Way:
    def work() -> None:
        data = load_data(Data(max_length=64, max_samples=64, **fields), spec.task, processor, seed=0)
        torch.manual_seed(0)
        model = load_model(spec, data.labels, seed=0).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
        for start in range(0, len(data.train), 32):
            batch = data.collate([data.train[i] for i in range(start, min(start + 32, len(data.train)))])
            data.model_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what other threads do is not on the clock
    os.environ[VARIABLE] = KEY.hex()
    key = {"env": VARIABLE}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = reviews(folder)
        spec = Model(path="packaged:minilm-l6", task="text-classification")
        tokenizer = load_processor(spec)
        images = media(folder / "pictures", picture, "image", ".jpg")
        waves = media(folder / "sounds", sound, "audio", ".wav")
        (folder / "bytes").write_bytes(os.urandom(64 * 2**20))
        looks, hears = transformers.ViTImageProcessorPil(), transformers.Wav2Vec2FeatureExtractor()
        split = {"split": {"validation": 0.05, "test": 0.05}}
        for cipher in CIPHERS:

            def sealed(source: Path, cipher: str = cipher) -> Path:
                target = folder / f"{source.name}.{cipher}"
                sealing.encrypt(source, target, KEY, cipher)
                return target

            private = sealed(file)
            for kind, way in (("text", loading), ("training", training)):
                plain = way(tokenizer, spec, {"train": str(file)})
                ours = way(tokenizer, spec, {"train": str(private), "key": key})
                rounds = options.rounds if kind == "text" else min(options.rounds, 3)  # seconds each
                rows.append(compare(f"{kind}/{cipher}", ours, plain, rounds))
            for source, task, processor in (
                (images, "image-classification", looks),
                (waves, "audio-classification", hears),
            ):
                more = {**split, "max_length": 16_000} if source is waves else split
                plain = epoch(task, processor, {"train": str(source / "train.csv"), **more})
                there = str(sealed(source) / "train.csv")
                ours = epoch(task, processor, {"train": there, "key": key, **more})
                rows.append(compare(f"{source.name}/{cipher}", ours, plain, options.rounds))
            vault = Vault(sealed(folder / "bytes"), KEY)

            def opened(vault: Vault = vault) -> None:
                for _ in vault.pieces("bytes"):
                    pass

            rows.append(compare(f"bytes/{cipher}", opened, (folder / "bytes").read_bytes, options.rounds))
            rows[-1]["MB_per_s"] = 64 * 2**20 / 1e3 / rows[-1]["ms"]
    found = {row["name"]: row["ratio"] for row in rows}
    bars = [
        (f"{kind}: at most 1.10 of the time in clear", all(found[f"{kind}/{cipher}"] <= 1.10 for cipher in CIPHERS))
        for kind in ("text", "pictures", "sounds", "training")
    ]
    columns = {"name": "row", "ratio": "× in clear", "min": "least", "max": "most", "ms": "ms", "MB_per_s": "MB/s"}
    write(options.json, rows, bars, markdown(rows, columns), plotted=None)


if __name__ == "__main__":
    main()
