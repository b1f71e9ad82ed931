"""Padding stands where the tokenizer puts it, so that every row gives what it gives alone."""

import csv
import json

import numpy as np
import pytest
import torch
from kit import xlnet
from kit.tiny import WORDS, tokenizer

from mptrain.data.load import load_data
from mptrain.data.tasks.text import pad
from mptrain.recipe import Data


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Texts with the class that the model gives to each alone, with transformers' own padding."""
    model, draw = xlnet.model(), np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 20))) for _ in range(200)]
    with torch.no_grad():
        logits = torch.cat([model(**xlnet.tokenizer()(text, return_tensors="pt")).logits for text in texts])
        model.logits_proj.bias -= logits.median(0).values  # half of the texts to each class
        classes = (logits - logits.median(0).values).argmax(1).tolist()
    file = tmp_path_factory.mktemp("judged") / "a.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *zip(texts, classes)])
    assert 20 < sum(classes) < 180
    return model, Data(train=str(file), validation=str(file), test=str(file), max_length=24)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_head_that_reads_the_last_place_scores_in_batches_what_it_scores_alone(judged, batch_size):
    model, spec = judged
    data = load_data(spec, "text-classification", xlnet.tokenizer(), seed=0)
    assert data.evaluate(lambda b: model(**b), "test", batch_size)[0].value == 1.0


def test_batches_are_padded_as_the_tokenizer_pads_them(judged):
    _, spec = judged
    for side in ("left", "right"):
        ours = xlnet.tokenizer(side)
        data = load_data(spec, "text-classification", ours, seed=0)
        rows = [data.train[i] for i in range(12)]
        found = data.collate(rows)
        expected = ours.pad([{k: np.asarray(v).tolist() for k, v in row.items()} for row in rows], return_tensors="pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        exact = data.example(3, 24)
        assert exact["input_ids"].shape == (3, 24)
        assert (exact["input_ids"] == 3).sum(1).tolist() == [1, 1, 1], "the last token, which is read, is there"


def test_labels_of_words_move_with_their_words(tmp_path):
    rows = [{"tokens": WORDS[: 2 + i], "tags": ["A", "B"] * ((3 + i) // 2)} for i in range(6)]
    for row in rows:
        row["tags"] = row["tags"][: len(row["tokens"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(tmp_path / "a.jsonl")
    spec = Data(train=file, validation=file, test=file, max_length=24)
    data = load_data(spec, "token-classification", xlnet.tokenizer(), seed=0)

    def forward(batch):
        """Words at an even place of WORDS are A."""
        word = batch["input_ids"] - len(xlnet.SPECIAL)
        return {"logits": torch.stack([word % 2 == 0, word % 2 == 1], -1).float()}

    assert [score.value for score in data.evaluate(forward, "test", 4)] == [1.0, 1.0]


def test_answers_move_with_their_words_and_no_answer_is_cls_wherever_it_is(tmp_path):
    rows = [
        {"question": "was film good", "context": " ".join(WORDS[: 5 + i]), "answers": {"text": [WORDS[3]]}}
        for i in range(6)
    ]
    for row in rows:
        row["answers"]["answer_start"] = [row["context"].index(WORDS[3])]
    rows.append({"question": "was film", "context": "the cast", "answers": []})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(tmp_path / "a.jsonl")
    spec = Data(train=file, validation=file, test=file, max_length=24, stride=2)
    for ours, cls in ((xlnet.tokenizer("left"), 3), (xlnet.tokenizer("right"), 3), (tokenizer(), 2)):
        data = load_data(spec, "question-answering", ours, seed=0)
        batch = data.collate([data.test[i] for i in range(len(data.test))])
        answer = ours.convert_tokens_to_ids(WORDS[3])
        for ids, start, end in zip(batch["input_ids"][:-1], batch["start_positions"], batch["end_positions"]):
            assert (ids[start], ids[end]) == (answer, answer)
        assert batch["input_ids"][-1][batch["start_positions"][-1]] == cls

        def forward(batch, answer=answer, cls=cls):
            hit = (batch["input_ids"] == answer) * 9.0 + (batch["input_ids"] == cls) * 5.0
            return {"start_logits": hit, "end_logits": hit}

        assert [score.value for score in data.evaluate(forward, "test", 3)] == [1.0, 1.0]


def test_a_language_model_is_padded_behind_its_text_whatever_its_tokenizer_says(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 3))
    file = str(tmp_path / "a.txt")
    spec = Data(train=file, validation=file, test=file, max_length=16, stride=8)
    data = load_data(spec, "causal-lm", xlnet.tokenizer(), seed=0)
    batch = data.collate([data.test[i] for i in range(len(data.test))])
    assert batch["attention_mask"][:, 0].all() and not batch["attention_mask"].all()


def test_what_is_cut_on_the_left_keeps_its_end():
    ours = xlnet.tokenizer()
    found = pad([{"input_ids": np.arange(4, 12), "attention_mask": np.ones(8, int)}], ours, 5)
    assert found["input_ids"].tolist() == [[7, 8, 9, 10, 11]]
