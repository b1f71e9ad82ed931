"""Encrypted data is read as data in clear is, and messages, hashes and files of a run say nothing of it."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import logging
import traceback
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, disable_progress_bars
from kit import sealed, tiny, tiny_tasks

from mptrain.core.errors import DataError, MptrainError
from mptrain.data.load import load_data
from mptrain.data.sealed import write
from mptrain.data.sealed.vault import Vault
from mptrain.data.sources import quoting
from mptrain.data.sources.read import read_source
from mptrain.data.sources.tables import read_table
from mptrain.models.processor import load_processor
from mptrain.recipe import Data, Model
from mptrain.train.peaks import Peaks, batches

pytest.importorskip("cryptography")
disable_progress_bars()

ROWS = [("a good film", "fresh"), ('so "bad"', "rotten"), ("two\nlines, one cell", "fresh")]
CANARY, NUMBER = "CANARYxyz", 7.1234567


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(sealed.VARIABLE, sealed.KEY.hex())


def opener(root: Path) -> Vault:
    return Vault(root, sealed.KEY)


def reviews(folder: Path, rows: int = 60) -> Path:
    return tiny.save_reviews(folder / "reviews.csv", rows)


def load(**fields):
    return load_data(Data(max_length=32, max_unknown=1.0, **fields), "text-classification", tiny.tokenizer(), seed=0)


def same(one, other) -> bool:
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


# -- it is read as in clear


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.bz2", "a.txt", "a.tsv"])
def test_every_format_has_the_same_cells(tmp_path, name):
    file, text = tmp_path / name, None
    if ".csv" in name:
        text = "text,label\n" + "".join('"{}",{}\n'.format(t.replace('"', '""'), y) for t, y in ROWS)
    elif ".jsonl" in name:
        text = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS)
    elif name == "a.tsv":
        text = "text\tlabel\na good film\tfresh\n"
    elif name == "a.txt":
        text = "one line\nanother\n"
    if text is None:
        pq.write_table(pa.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}), file)
    else:
        packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(file.suffix, bytes)
        file.write_bytes(packed(text.encode()))
    plain = read_table(str(file), "data.train")
    found = read_table(str(sealed.encrypted(file)), "data.train", [], opener)
    assert found.columns == plain.columns and found.separator == plain.separator


@pytest.mark.parametrize("task", ["image-classification", "audio-classification"])
def test_media_in_an_encrypted_folder_give_the_same_examples(tmp_path, task):
    folder = tmp_path / "in"
    folder.mkdir()
    made = tiny_tasks.CASES[task].make(folder)
    processor = load_processor(Model(path=str(folder / "model"), task=task))
    plain = load_data(Data(**made["data"]), task, processor, seed=0)
    found = load_data(Data(**sealed.private(made["data"], folder)), task, processor, seed=0)
    assert len(found.train) == len(plain.train)
    assert all(same(plain.train[i], found.train[i]) for i in range(8))


def test_a_datasets_folder_with_media_is_read_in_memory(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    tiny_tasks.CASES["image-classification"].make(folder)
    names = ["left", "right", "below"]
    rows = list(csv.DictReader((folder / "data.csv").read_text().splitlines()))
    columns = {
        "image": [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in rows],
        "label": [names.index(row["label"]) for row in rows],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    whole = Dataset.from_dict(columns, features=features)
    DatasetDict({"train": whole.select(range(90)), "test": whole.select(range(90, 120))}).save_to_disk(tmp_path / "ds")
    processor = load_processor(Model(path=str(folder / "model"), task="image-classification"))
    plain = load_data(Data(source=str(tmp_path / "ds")), "image-classification", processor, seed=0)
    (tmp_path / "ds.plain").mkdir()
    where = str(sealed.encrypted(tmp_path / "ds"))
    found = load_data(Data(source=where, key=sealed.WHERE), "image-classification", processor, seed=0)
    assert found.labels == plain.labels == names and found.facts["rows"] == plain.facts["rows"]
    assert all(same(plain.test[i], found.test[i]) for i in range(30))


def test_a_datasets_folder_without_splits_is_one_for_training(tmp_path):
    Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]}).save_to_disk(tmp_path / "ds")
    source = read_source(Data(source=str(sealed.encrypted(tmp_path / "ds")), key=sealed.WHERE), [])
    assert source.tables["train"].columns == {"text": ["one", "two"], "n": [1, 2]}


# -- what is wrong


def test_keys_and_data_belong_together(tmp_path):
    plain = reviews(tmp_path)
    private = sealed.encrypted(plain)
    with pytest.raises(DataError, match=r"is encrypted\. Say where its key is"):
        load(train=str(private))
    with pytest.raises(DataError, match=r"is not encrypted, and data\.key is given"):
        load(train=str(private), test=str(plain), key=sealed.WHERE)
    with pytest.raises(DataError, match=r"no encrypted folder, and data\.key"):
        load(source="owner/name", key=sealed.WHERE)
    with pytest.raises(DataError, match=r"no encrypted folder, and data\.key"):
        load(source="packaged:film-reviews", key=sealed.WHERE)
    with pytest.raises(DataError, match=r"is encrypted\. Say where"):
        load(source=str(private))
    with pytest.raises(DataError, match="holds no folder that `datasets` saved"):
        load(source=str(private), key=sealed.WHERE)


def test_files_of_an_encrypted_folder_are_named_in_it(tmp_path):
    (tmp_path / "in" / "below").mkdir(parents=True)
    reviews(tmp_path / "in" / "below")
    (tmp_path / "in" / "other.csv").write_text("text,label\n")
    private = sealed.encrypted(tmp_path / "in")
    assert len(load(train=str(private / "below" / "reviews.csv"), key=sealed.WHERE).train) > 30
    with pytest.raises(DataError, match="an encrypted folder of 2 files; name one"):
        load(train=str(private), key=sealed.WHERE)
    with pytest.raises(DataError, match=r"holds no none\.csv"):
        load(train=str(private / "none.csv"), key=sealed.WHERE)


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside.png", "images/none.png"])
def test_cells_of_an_encrypted_table_name_no_files_outside(tmp_path, path):
    folder = tmp_path / "in"
    folder.mkdir()
    made = tiny_tasks.CASES["image-classification"].make(folder)
    (tmp_path / "outside.png").write_bytes((folder / "images" / "0.png").read_bytes())
    text = (folder / "data.csv").read_text().replace("images/7.png", path)
    (folder / "data.csv").write_text(text)
    processor = load_processor(Model(path=str(folder / "model"), task="image-classification"))
    with pytest.raises(DataError, match="row 8 of") as caught:
        load_data(Data(**sealed.private(made["data"], folder)), "image-classification", processor, seed=0)
    assert path not in str(caught.value)


# -- nothing is quoted


def poisoned(folder: Path, data: dict, column: str, value) -> None:
    """The canary in the first row of the training file; a csv holds text."""
    file = Path(data["train"])
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0][column] = value
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = list(csv.DictReader(file.read_text().splitlines()))
        rows[0][column] = value if isinstance(value, str) else json.dumps(value)
        with file.open("w", newline="", errors="surrogatepass") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def said(load_it, caplog) -> str:
    """Everything that is printed: errors with their traceback, and logs."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        try:
            load_it()
        except Exception as error:
            return caplog.text + "".join(traceback.format_exception(error))
    return caplog.text


VALUES = (CANARY, [CANARY], {CANARY: CANARY}, NUMBER, f"{CANARY} {NUMBER}", [[CANARY]], f"{CANARY}\ud800")


@pytest.mark.parametrize("task", tiny_tasks.CASES)
def test_no_message_of_any_task_quotes_a_cell_of_encrypted_data(tmp_path, task, caplog, monkeypatch):
    quoted = False
    for number, value in enumerate(VALUES):
        first = tmp_path / f"{number}"
        first.mkdir()
        made = tiny_tasks.CASES[task].make(first)
        file = Path(made["data"]["train"])
        before = file.read_bytes()
        spec = Model.model_validate({"path": str(first / "model"), "task": task, **made["model"]})
        processor = load_processor(spec, True)
        columns = list(json.loads(before.splitlines()[0])) if file.suffix == ".jsonl" else ["image", "audio", "label"]
        for column in [c for c in columns if c.encode() in before.splitlines()[0]]:
            file.write_bytes(before)
            poisoned(first, made["data"], column, value)
            monkeypatch.setattr(quoting, "_hidden", False)
            plain = said(partial(load_data, Data(**made["data"]), task, processor, seed=0), caplog)
            quoted |= CANARY in plain or str(NUMBER) in plain
            files = tmp_path / f"{number}-{column}"
            files.mkdir()
            for path in [file, *first.glob("images"), *first.glob("sounds")]:
                path.rename(files / path.name)
            private = sealed.private({**made["data"], "train": str(files / file.name)}, files)
            text = said(partial(load_data, Data(**private), task, processor, seed=0), caplog)
            assert CANARY not in text and str(NUMBER) not in text, text
            for path in files.iterdir():
                path.rename(first / path.name)
    assert quoted  # else nothing here would have been found


def test_a_file_without_a_header_is_not_quoted_as_one(tmp_path):
    (tmp_path / "a.csv").write_text(f"{CANARY},fresh\nanother,rotten\n")
    (tmp_path / "b.csv").write_text(f"{CANARY},{CANARY}\nanother,rotten\n")
    (tmp_path / "c.csv").write_text(f"{CANARY};label\nanother;rotten\n")
    (tmp_path / "d.jsonl").write_text(f'{{"text": "{CANARY}\n')
    for name in "a.csv", "b.csv", "c.csv", "d.jsonl":
        with pytest.raises(DataError) as caught:
            load(train=str(sealed.encrypted(tmp_path / name)), key=sealed.WHERE)
        assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_what_libraries_say_of_private_data_is_not_passed_on(tmp_path, monkeypatch):
    from mptrain.data.tasks import text_task

    def broken(*_args, **_more):
        raise RuntimeError(CANARY)

    monkeypatch.setattr(text_task, "tokenize", broken)
    with pytest.raises(DataError, match=r"RuntimeError in broken") as caught:
        load(train=str(sealed.encrypted(reviews(tmp_path))), key=sealed.WHERE)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


# -- what a run keeps


def test_hashes_are_keyed_and_survive_a_rotation(tmp_path, monkeypatch):
    file = reviews(tmp_path)
    private, plain = sealed.encrypted(file), load(train=str(file))
    found = load(train=str(private), key=sealed.WHERE)
    assert found.hash != plain.hash and found.facts["test_hash"] != plain.facts["test_hash"]
    assert found.hash == load(train=str(private), key=sealed.WHERE).hash
    other = bytes(32)
    write.rotate(Vault(private, sealed.KEY), tmp_path / "rotated", other, "chacha20-poly1305")
    monkeypatch.setenv(sealed.VARIABLE, other.hex())
    rotated = load(train=str(tmp_path / "rotated"), key=sealed.WHERE)
    assert (rotated.hash, rotated.facts["test_hash"]) == (found.hash, found.facts["test_hash"])


def test_where_the_key_is_stays_out_of_what_is_dumped():
    spec = Data(train="a.csv", key={"command": ["vault", "--token", CANARY]})
    assert "key" not in spec.model_dump() and CANARY not in json.dumps(spec.model_dump(mode="json"))


def test_kept_examples_are_encrypted_and_read_again(tmp_path):
    ids = torch.arange(100, 112)[None]
    for name, secret in (("peaks-0.safetensors", None), ("private/peaks-0.safetensors", sealed.KEY)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(200, 4), torch.nn.Linear(4, 4)).train()
        peaks = Peaks(model, path, secret)
        model(ids)
        peaks.step({"input_ids": ids})
        peaks.save()
        in_clear = ids.numpy().tobytes() in path.read_bytes()
        assert in_clear == (secret is None)
        (batch, *_) = batches([path.parent], secret)
        assert torch.equal(batch["input_ids"], torch.cat([ids, ids]))
        again = Peaks(model, path, secret)
        again.load()
        assert again.largest == peaks.largest
    with pytest.raises(MptrainError, match="written with other data"):
        batches([tmp_path / "private"], hashlib.sha256(b"other").digest())
