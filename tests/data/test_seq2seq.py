"""Texts that a model writes: what is read, where it stops, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from kit import tiny_tasks

from mptrain.core.errors import DataError, ModelError
from mptrain.data.load import load_data
from mptrain.data.sources.packaged_dates import rows
from mptrain.data.tasks.seq2seq import WRITTEN
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe import Data, Model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    made = tiny_tasks.CASES["seq2seq"].make(folder)
    spec = Model(path=str(folder / "model"), task="seq2seq")
    return folder, made, load_data(Data.model_validate(made["data"]), "seq2seq", load_processor(spec), seed=1)


def test_the_decoder_reads_the_target_one_place_later(case):
    _, _, data = case
    batch = data.collate([data.train[0], data.train[1]])
    labels, ids = batch["labels"], batch["decoder_input_ids"]
    assert (ids[:, 0] == 3).all() and torch.equal(ids[:, 1:], labels[:, :-1])
    assert labels[0].tolist()[0] == 2 and labels[0].tolist()[-1] == 3, "[CLS] name place [SEP]"


def test_what_is_written_is_what_the_model_generates(case):
    folder, _, data = case
    model = load_model(Model(path=str(folder / "model"), task="seq2seq"), None, seed=0)
    batch = data.without_targets(data.collate([data.test[i] for i in range(4)]))
    with torch.no_grad():
        written = data.answers(lambda given: model(**given), batch)[WRITTEN]
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        longest = max(data.facts["longest_target"].values())
        expected = model.generate(**given, max_new_tokens=longest, do_sample=False, forced_eos_token_id=None)[:, 1:]
    assert np.array_equal(written, expected[:, : written.shape[1]].numpy())


def test_a_model_that_stops_at_once_writes_nothing_and_is_scored(case):
    _, _, data = case

    def silent(batch):
        logits = torch.zeros(*batch["decoder_input_ids"].shape, len(data.processor))
        logits[..., data.end] = 9.0
        return {"logits": logits}

    scores = {score.name: score.value for score in data.evaluate(silent, "test")}
    assert scores["exact_match"] == scores["rouge_l"] == 0.0 and scores["loss"] > 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "film", "target": "  "}, "is empty, so there is nothing to write"),
        ({"text": "film", "target": 7}, "7"),
    ],
)
def test_a_target_that_is_no_text_is_named(case, row, message):
    folder, made, data = case
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "bad.jsonl").write_text("\n".join([json.dumps(row), *lines]) + "\n")
    spec = Data.model_validate({**made["data"], "train": str(folder / "bad.jsonl")})
    with pytest.raises(DataError, match=message) as raised:
        load_data(spec, "seq2seq", data.processor, seed=1)
    assert "row 1" in str(raised.value) and "target" in str(raised.value)


def test_a_config_without_a_start_token_is_refused(case, tmp_path):
    folder, made, _ = case
    processor = load_processor(Model(path=str(folder / "model"), task="seq2seq"))
    processor.name_or_path = str(tmp_path)
    config = json.loads((folder / "model" / "config.json").read_text()) | {"decoder_start_token_id": None}
    with pytest.raises(ModelError, match=r"has no config\.json beside its tokenizer"):
        load_data(Data.model_validate(made["data"]), "seq2seq", processor, seed=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        load_data(Data.model_validate(made["data"]), "seq2seq", processor, seed=1)


def test_packaged_dates_are_the_same_everywhere_and_have_one_right_answer():
    found = list(rows())
    assert len(found) == 4000 and found[0] == next(rows())
    answers = {}
    for text, target in found:
        assert answers.setdefault(text, target) == target
        assert target[:4] in text
