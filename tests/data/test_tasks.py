"""Each task: encoding, batches and scores, against models whose scores are known beforehand."""

import csv
import io
import itertools
import json
import math
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, DatasetDict, Features, Image, Value, disable_progress_bars
from kit.tiny import WORDS, save_bert, save_reviews, tokenizer
from PIL import Image as Pictures
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, ViTImageProcessorPil
from transformers import Wav2Vec2FeatureExtractor as Extractor

from mptrain.core.errors import DataError, MptrainError
from mptrain.data.load import load_data
from mptrain.data.sources.splits import cut
from mptrain.data.tasks.base import IGNORED
from mptrain.data.tasks.question_answering import LONGEST_ANSWER, _best_span
from mptrain.data.tasks.sounds import read_sound
from mptrain.recipe import Calibration, Data

disable_progress_bars()


def piece_tokenizer():
    """Word pieces of single letters: "film" is f ##i ##l ##m."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters)]
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def values(scores):
    return {score.name: score.value for score in scores}


# -- text classification and what all tasks share


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    save_bert(folder / "bert")
    model = BertForSequenceClassification.from_pretrained(folder / "bert").eval()
    file = save_reviews(folder / "reviews.csv")
    return load_data(Data(train=str(file), max_length=12), "text-classification", tokenizer(), seed=3), model


def test_text_is_encoded_as_the_tokenizer_does(reviews):
    data, _ = reviews
    texts, targets = data.texts["test"]
    for i in (0, 5, len(texts) - 1):
        expected = tokenizer()(texts[i], truncation=True, max_length=12)
        found = data.test[i]
        assert {k: v.tolist() for k, v in found.items() if k != "labels"} == dict(expected)
        assert found["labels"] == targets[i]
        assert data.test.lengths[i] == len(expected["input_ids"])
    assert data.facts["at_max_length"]["test"] == data.test.lengths.count(12) > 0


def test_batches_are_padded_on_the_right(reviews):
    data, _ = reviews
    rows = [data.train[i] for i in range(6)]
    batch = data.collate(rows)
    expected = tokenizer().pad(
        [{k: np.asarray(v).tolist() for k, v in row.items()} for row in rows], return_tensors="pt"
    )
    assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_scores_are_those_of_a_plain_loop_in_the_order_of_the_data(reviews):
    data, model = reviews
    right, losses = [], []
    with torch.no_grad():
        for i in range(len(data.test)):
            batch = data.collate([data.test[i]])
            target = batch.pop("labels")
            logits = model(**batch).logits
            right.append(float(logits.argmax() == target))
            losses.append(float(cross_entropy(logits, target)))
    for batch_size in (1, 7, 64):
        accuracy, loss = data.evaluate(lambda b: model(**b), "test", batch_size)
        assert (accuracy.name, loss.name, loss.higher_is_better) == ("accuracy", "loss", False)
        assert accuracy.stats[:, 0].tolist() == right
        np.testing.assert_allclose(loss.stats[:, 0], losses, atol=1e-5)
        assert (accuracy.n, accuracy.value) == (len(right), pytest.approx(np.mean(right)))


def test_evaluation_takes_arrays_never_shows_targets_and_sorts_by_length(reviews):
    data, _ = reviews
    shapes = []

    def forward(batch):
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
        shapes.append(batch["input_ids"].shape[1])
        return {"logits": np.tile(np.float32([0.0, 1.0]), (len(batch["input_ids"]), 1))}

    accuracy, loss = data.evaluate(forward, "validation", 4)
    assert accuracy.value == pytest.approx(np.mean(data.texts["validation"][1]))
    assert set(np.round(loss.stats[:, 0], 6)) == {round(math.log(1 + math.e), 6), round(math.log(1 + 1 / math.e), 6)}
    assert shapes == sorted(shapes, reverse=True)


def test_outputs_that_are_not_finite_or_not_there_are_errors(reviews):
    data, _ = reviews
    with pytest.raises(MptrainError, match="not finite"):
        data.evaluate(lambda b: {"logits": torch.full((len(b["input_ids"]), 2), float("nan"))}, "test")
    with pytest.raises(MptrainError, match=r"no output 'logits'.* it has last_hidden_state"):
        data.evaluate(lambda b: {"last_hidden_state": torch.zeros(1)}, "test")


def test_a_bar_is_only_drawn_on_a_terminal(reviews, capsys, monkeypatch):
    data, model = reviews
    data.evaluate(lambda b: model(**b), "test", progress="testing")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    data.evaluate(lambda b: model(**b), "test", progress="testing")
    assert "testing" in capsys.readouterr().err


def test_calibration_is_drawn_from_train_by_the_seed(reviews):
    data, _ = reviews
    batches = data.calibration(20, 8)
    assert [len(b["input_ids"]) for b in batches] == [8, 8, 4]
    assert all("labels" not in b for b in batches)
    labelled = data.labelled(Calibration(samples=20, batch_size=8))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, labelled))
    assert sum(len(b["labels"]) for b in labelled) == 20
    train = {tuple(data.train[i]["input_ids"]) for i in range(len(data.train))}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
            assert tuple(ids[mask.bool()].tolist()) in train
    again = load_data(data.spec, data.kind.name, tokenizer(), seed=3).calibration(20, 8)
    other = load_data(data.spec, data.kind.name, tokenizer(), seed=4).calibration(20, 8)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other))
    assert sum(len(b["input_ids"]) for b in data.calibration(10**6, 64)) == len(data.train)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 40), (500, 12)])
def test_example_has_exactly_the_size_asked_for(reviews, batch, length):
    data, model = reviews
    found = data.example(batch, length)
    assert {name: tuple(v.shape) for name, v in found.items()} == dict.fromkeys(found, (batch, length))
    assert "labels" not in found
    assert found["attention_mask"][0].sum() == min(length, 12)
    with torch.no_grad():
        assert model(**found).logits.isfinite().all()


def test_pairs_of_texts(tmp_path):
    rows = [{"a": f"good film {i}", "b": f"bad cast {i}", "label": i % 3} for i in range(60)]
    spec = Data(train=jsonl(tmp_path / "a.jsonl", rows), text="a", text_pair="b", max_length=16, max_unknown=1.0)
    data = load_data(spec, "text-classification", tokenizer(), seed=0)
    assert data.labels == ["0", "1", "2"]
    first = data.train[0]
    assert first["input_ids"].tolist() == tokenizer()("good film x", "bad cast x")["input_ids"]
    assert first["token_type_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert data.texts["train"][0][0].startswith("good film")
    assert "bad cast" in data.texts["train"][0][0]


# -- token classification


TAGGED = [
    {"tokens": ["anna", "lives", "in", "new", "york", "."], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]},
    {"tokens": ["bob", "\u200b", "sees", "ann"], "tags": ["B-PER", "O", "O", "B-PER"]},
    {"tokens": "a long way to rome", "tags": "O O O O B-LOC"},
]


def tagged(tmp_path, max_length=64, rows=TAGGED):
    file = jsonl(tmp_path / "a.jsonl", rows * 4)
    spec = Data(train=file, validation=file, test=file, max_length=max_length)
    return load_data(spec, "token-classification", piece_tokenizer(), seed=0)


def tagger(data, predict):
    """A model that gives the first piece of every word the tag `predict(gold index)`."""

    def forward(batch):
        golds = {tuple(data.test[i]["input_ids"]): data.test[i]["labels"] for i in range(len(data.test))}
        logits = torch.zeros(*batch["input_ids"].shape, len(data.labels))
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
            for place, gold in enumerate(golds[tuple(ids[mask.bool()].tolist())]):
                logits[row, place, predict(gold) if gold != IGNORED else 1] = 9.0
        return {"logits": logits}

    return forward


def test_the_first_piece_of_a_word_carries_its_tag(tmp_path):
    data = tagged(tmp_path)
    assert data.labels == ["B-LOC", "B-PER", "I-LOC", "O"]
    example = data.train[0]
    pieces = piece_tokenizer().convert_ids_to_tokens(example["input_ids"].tolist())
    named = [(p, data.labels[t]) for p, t in zip(pieces, example["labels"]) if t != IGNORED]
    assert named == [("a", "B-PER"), ("l", "O"), ("i", "O"), ("n", "B-LOC"), ("y", "I-LOC"), (".", "O")]
    assert set(data.collate([data.train[0], data.train[1]])["labels"][1][-5:].tolist()) == {IGNORED}


def test_right_tags_score_one_and_words_without_pieces_count_as_outside(tmp_path):
    data = tagged(tmp_path)
    f1, accuracy = data.evaluate(tagger(data, lambda gold: gold), "test", 5)
    assert (f1.name, f1.value, accuracy.value) == ("f1", 1.0, 1.0)
    assert f1.stats.shape == (12, 3)
    assert accuracy.stats[:3].tolist() == [[6, 6], [4, 4], [5, 5]]


def test_words_that_were_cut_off_are_missed_entities(tmp_path):
    data = tagged(tmp_path, max_length=9)
    assert data.facts["words_cut_off"]["test"] > 0
    f1, _ = data.evaluate(tagger(data, lambda gold: gold), "test")
    assert f1.stats[:3].tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 1]]


def test_all_outside_finds_no_entity(tmp_path):
    data = tagged(tmp_path)
    f1, accuracy = data.evaluate(tagger(data, lambda gold: data.labels.index("O")), "test")
    assert (f1.value, accuracy.value) == (0.0, pytest.approx(9 / 15))


def test_tags_that_do_not_fit_are_errors(tmp_path):
    bad = [{"tokens": ["a", "b"], "tags": ["O"]}]
    with pytest.raises(DataError, match=r"row 1 of .* has 2 words but 1 tags"):
        tagged(tmp_path, rows=bad)
    with pytest.raises(DataError, match="numbers for tags"):
        tagged(tmp_path, rows=[{"tokens": ["a", "b"], "tags": [0, 1]}])
    with pytest.raises(DataError, match=r"data.tokens: row 1 of .* holds 5"):
        tagged(tmp_path, rows=[{"tokens": 5, "tags": ["O"]}])
    with pytest.raises(DataError, match=r"data.tokens: row 2 of .* holds '\\ud83d', half of a character"):
        tagged(tmp_path, rows=[TAGGED[0], {"tokens": ["a", "\ud83d"], "tags": ["O", "O"]}])


def test_a_tag_that_training_lacks_names_the_row_of_its_sentence(tmp_path, caplog):
    rows = [{"tokens": ["the", f"w{i}"], "tags": ["O", "B-X"]} for i in range(60)]
    spec = Data(train=jsonl(tmp_path / "a.jsonl", rows), max_length=16)
    parts = cut([json.dumps([row["tokens"]]) for row in rows], {"validation": 0.1, "test": 0.2})
    last = parts["test"][-1]
    rows[last]["tags"] = ["O", "B-Y"]
    jsonl(tmp_path / "a.jsonl", rows)
    data = load_data(spec, "token-classification", piece_tokenizer(), seed=0)
    assert f"data.tags: 1 of {2 * len(parts['test'])} labels of test are" in caplog.text
    assert f"('B-Y': 1; first in row {last + 1})" in caplog.text
    assert (data.labels, data.unseen) == (["B-X", "O"], ["B-Y"])
    f1, accuracy = data.evaluate(tagger(data, lambda gold: min(gold, 1)), "test")
    assert f1.stats[-1].tolist() == [0, 0, 1] and accuracy.stats[-1].tolist() == [1, 2]
    whole = load_data(
        spec.model_copy(update={"labels": ["O", "B-X", "B-Y"]}), "token-classification", piece_tokenizer(), seed=0
    )
    assert whole.evaluate(tagger(whole, lambda gold: gold), "test")[0].value == 1.0
    rows[last]["tags"] = ["O"]
    jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"data.tags: row {last + 1} of .* has 2 words but 1 tags"):
        load_data(spec, "token-classification", piece_tokenizer(), seed=0)


# -- question answering


def questions(n=8, filler=10):
    rows = []
    for i in range(n):
        context = f"{'word ' * (i * filler)}the film of year {i} is shown in city {i}. {'more ' * filler}"
        answer = f"city {i}"
        rows.append(
            {
                "question": f" where is film {i} ?",
                "context": context,
                "answers": {"text": [answer, f"in city {i}"], "answer_start": [context.index(answer)] * 1 + [0]},
            }
        )
        rows[-1]["answers"]["answer_start"][1] = context.index(f"in city {i}")
    return rows


def asked(tmp_path, rows, **fields):
    file = jsonl(tmp_path / "q.jsonl", rows)
    spec = Data(train=file, validation=file, test=file, **{"max_length": 64, "stride": 16, **fields})
    return load_data(spec, "question-answering", piece_tokenizer(), seed=0)


def reader(data, hint=9.0):
    """A model that points at the target of every window it has seen in the data."""

    def forward(batch):
        known = {}
        for i in range(len(data.test)):
            known[tuple(data.test[i]["input_ids"])] = (data.test[i]["start_positions"], data.test[i]["end_positions"])
        start, end = torch.zeros(2, *batch["input_ids"].shape)
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
            first, last = known[tuple(ids[mask.bool()].tolist())]
            start[row, first], end[row, last] = hint, hint
        return {"start_logits": start, "end_logits": end}

    return forward


def test_every_answer_is_whole_in_a_window_and_read_back(tmp_path):
    rows = questions()
    data = asked(tmp_path, rows)
    assert len(data.train) > len(rows) == data.evaluate(reader(data), "test", 3)[0].n
    assert values(data.evaluate(reader(data), "test", 3)) == {"f1": 1.0, "exact_match": 1.0}
    ids, pieces = data.train[0], piece_tokenizer()
    span = ids["input_ids"][ids["start_positions"] : ids["end_positions"] + 1]
    assert pieces.convert_ids_to_tokens(span.tolist()) == ["c", "##i", "##t", "##y", "0"]
    assert max(data.train.lengths) <= 64


def test_windows_overlap_by_the_stride_and_cover_the_context(tmp_path):
    data = asked(tmp_path, questions(3))
    for row, question in enumerate(questions(3)):
        windows = [w.offsets[w.offsets[:, 0] >= 0] for w in data._windows["test"] if w.row == row]
        assert windows[0][0, 0] == 0
        assert windows[-1][-1, 1] == len(question["context"].rstrip())
        for one, two in itertools.pairwise(windows):
            assert two[0, 0] == one[-16, 0]


def test_a_wrong_answer_scores_zero_exact(tmp_path):
    data = asked(tmp_path, questions())

    def first_word(batch):
        start = torch.zeros(batch["input_ids"].shape)
        return {"start_logits": start, "end_logits": start}

    f1, exact = data.evaluate(first_word, "test")
    assert exact.value == 0.0
    assert f1.value < 0.5


def test_questions_without_answer(tmp_path):
    rows = [
        *questions(4),
        {"question": "why ?", "context": "nobody knows", "answers": {"text": [], "answer_start": []}},
    ]
    data = asked(tmp_path, rows)
    last = data.test[len(data.test) - 1]
    assert (last["start_positions"], last["end_positions"]) == (0, 0)
    assert values(data.evaluate(reader(data), "test")) == {"f1": 1.0, "exact_match": 1.0}

    def shy(batch):
        """The reader, but surer still that there is no answer."""
        outputs = reader(data)(batch)
        outputs["start_logits"][:, 0] = 99.0
        return outputs

    assert values(data.evaluate(shy, "test"))["exact_match"] == pytest.approx(1 / 5)
    data = asked(tmp_path, questions(4))
    assert values(data.evaluate(shy, "test"))["exact_match"] == 1.0, "every question has an answer: one is always given"


def test_the_window_least_sure_of_no_answer_decides(tmp_path):
    context = "first " + "nobody knows " * 20
    data = asked(tmp_path, [{"question": "why ?", "context": context, "answers": []}])
    assert len(data.test) > 2
    first = torch.from_numpy(data.test[0]["input_ids"])

    def forward(batch):
        """No answer scores 3 in the first window and 6 in the others; a span of the context 4.5 in all."""
        start, end = torch.full((2, *batch["input_ids"].shape), -9.0)
        for row, ids in enumerate(batch["input_ids"]):
            start[row, 0], end[row, 0] = (3.0 if torch.equal(ids, first) else 6.0), 0.0
            start[row, 20], end[row, 20] = 4.5, 0.0
        return {"start_logits": start, "end_logits": end}

    assert data.evaluate(forward, "test", 1)[0].value == 0.0
    data._windows["test"] = data._windows["test"][1:]  # without the first window, no answer is the answer
    data._splits["test"] = type(data.test)(lambda i: data.validation[i + 1], data.test.lengths[1:])
    assert data.evaluate(forward, "test", 1)[0].value == 1.0


def test_the_best_span_is_that_of_brute_force():
    draw = np.random.default_rng(0)
    for size in (1, 5, 60):
        start, end = draw.normal(size=(2, size)).astype(np.float32)
        allowed = draw.random(size) < 0.7
        allowed[draw.integers(size)] = True
        spans = [
            (start[i] + end[j], i, j)
            for i in range(size)
            for j in range(i, min(size, i + LONGEST_ANSWER))
            if allowed[i] and allowed[j]
        ]
        assert _best_span(start, end, allowed) == (pytest.approx(max(spans)[0]), *max(spans)[1:])


def test_answers_in_other_layouts(tmp_path):
    rows = questions(3)
    rows[0]["answers"] = json.dumps(rows[0]["answers"])
    rows[1]["answers"] = [{"text": "city 1", "answer_start": rows[1]["context"].index("city 1")}]
    assert values(asked(tmp_path, rows).evaluate(reader(asked(tmp_path, rows)), "test"))["exact_match"] == 1.0


def test_answers_that_cannot_be_are_errors(tmp_path):
    rows = questions(3)
    rows[1]["answers"] = {"text": ["city 1"], "answer_start": [3]}
    with pytest.raises(DataError, match=r"row 2 .*does not hold 'city 1' at character 3"):
        asked(tmp_path, rows)
    rows[1]["answers"] = "city 1"
    with pytest.raises(DataError, match=r"row 2 .*answers look like"):
        asked(tmp_path, rows)
    with pytest.raises(DataError, match=r"data.max_length: 24 leaves 8 tokens .* overlap by 16"):
        asked(tmp_path, questions(3), max_length=24)


@pytest.mark.parametrize("row", [1, 17, 40])
def test_answers_and_questions_are_named_by_the_row_of_the_file(tmp_path, row):
    rows = questions(40)
    good = rows[row - 1]
    rows[row - 1] = good | {"answers": "city 1"}
    spec = Data(train=jsonl(tmp_path / "a.jsonl", rows), max_length=32, stride=4)
    with pytest.raises(DataError, match=rf"data.answers: row {row} of .*answers look like"):
        load_data(spec, "question-answering", piece_tokenizer(), seed=0)
    rows[row - 1] = good | {"question": "where is " * 20}
    jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"data.max_length: 32 leaves 0 tokens .* row {row} of "):
        load_data(spec, "question-answering", piece_tokenizer(), seed=0)
    for field in ("question", "context"):
        rows[row - 1] = good | {field: good[field] + "\ud83d"}
        jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(DataError, match=rf"data.{field}: row {row} of .* holds '\\ud83d'"):
            load_data(spec, "question-answering", piece_tokenizer(), seed=0)


# -- causal language modelling


def written(tmp_path, **fields):
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS, draw.integers(3, 30))) for _ in range(40)]
    lines[5] = lines[20] = lines[30] = lines[39] = ""  # equal lines stay where they are
    text = "\n".join(lines)
    (tmp_path / "text.txt").write_text(text)
    return load_data(Data(train=str(tmp_path / "text.txt"), **fields), "causal-lm", tokenizer(), seed=0), text


TABLE = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))


def bigram(batch):
    """A language model that only looks at the last token, so context does not matter."""
    return {"logits": TABLE[batch["input_ids"]]}


def stream_losses(text):
    ids = torch.tensor(tokenizer()(text)["input_ids"])
    return cross_entropy(TABLE[ids[:-1]], ids[1:], reduction="none").double()


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_overlapping_windows_predict_every_token_once(tmp_path, stride):
    data, text = written(tmp_path, max_length=17, stride=stride)
    expected = stream_losses("\n".join(text.split("\n")[32:]))
    loss, perplexity = data.evaluate(bigram, "test", 4)
    assert loss.stats[:, 1].sum() == len(expected)
    assert loss.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert perplexity.value == pytest.approx(math.exp(expected.mean()), rel=1e-6)
    assert (loss.name, perplexity.name, loss.higher_is_better, perplexity.higher_is_better) == (
        "loss",
        "perplexity",
        False,
        False,
    )


def test_every_later_token_of_a_window_has_enough_before_it(tmp_path):
    data, _ = written(tmp_path, max_length=16, stride=4)
    for i in range(1, len(data.test)):
        labels = data.test[i]["labels"]
        assert (labels[:12] == IGNORED).all()
        assert (labels[12:] != IGNORED).all()


def test_the_stride_is_half_a_window_by_default_and_never_a_whole_one(tmp_path):
    data, text = written(tmp_path, max_length=17)
    assert data.facts["perplexity"] == {"window": 17, "stride": 8}
    assert data.evaluate(bigram, "test")[0].stats[:, 1].sum() == len(stream_losses("\n".join(text.split("\n")[32:])))
    with pytest.raises(DataError, match=r"data.stride: 16 is not below data.max_length \(16\).* at most 15"):
        written(tmp_path, max_length=16, stride=16)
    with pytest.raises(DataError, match=r"data.max_length: a window of 1 token"):
        written(tmp_path, max_length=1)


def test_text_stays_in_order_and_whole(tmp_path):
    data, text = written(tmp_path, max_length=16, stride=4)
    assert data.facts["rows"] == {"train": 28, "validation": 4, "test": 8}
    stream = [token for i in range(len(data.train)) for token in data.train[i]["input_ids"].tolist()]
    assert stream == tokenizer()("\n".join(text.split("\n")[:28]))["input_ids"]
    assert "overlap_with_train" not in data.facts


def test_rows_of_a_table_are_joined_by_blank_lines(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c\nd"}])
    tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", "a", "b", "c", "d", "\n"])}, []))
    letters = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>")
    data = load_data(Data(train=file, validation=file, test=file, max_length=50), "causal-lm", letters, seed=0)
    assert data.test[0]["input_ids"].tolist() == [1, 2, 5, 5, 3, 5, 4]
    (tmp_path / "a.txt").write_text("ab\n\nc\nd")
    file = str(tmp_path / "a.txt")
    data = load_data(Data(train=file, validation=file, test=file, max_length=50), "causal-lm", letters, seed=0)
    assert data.test[0]["input_ids"].tolist() == [1, 2, 5, 5, 3, 5, 4]


def test_language_windows_are_capped_and_checked(tmp_path):
    data, _ = written(tmp_path, max_length=8, max_samples=3)
    assert data.facts["examples"] == {"train": 3, "validation": 3, "test": 3}
    with pytest.raises(DataError, match=r"data.stride: 20 is not below data.max_length"):
        written(tmp_path, max_length=8, stride=20)
    (tmp_path / "one.txt").write_text("word")
    with pytest.raises(DataError, match="too few to cut"):
        load_data(Data(train=str(tmp_path / "one.txt")), "causal-lm", tokenizer(), seed=0)


def test_the_loss_is_that_of_transformers(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    data, _ = written(tmp_path, max_length=16, stride=15)
    config = OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    model = OPTForCausalLM(config).eval()
    loss, _ = data.evaluate(lambda b: model(**b), "test", 5)
    for i in range(len(data.test)):
        with torch.no_grad():
            expected = float(model(**data.collate([data.test[i]])).loss)
        assert loss.stats[i, 0] / loss.stats[i, 1] == pytest.approx(expected, rel=1e-5)


# -- pictures


COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def picture(colour, size=(20, 12), form="PNG"):
    stream = io.BytesIO()
    Pictures.new("RGB", size, COLOURS[colour]).save(stream, form)
    return stream.getvalue()


def pictures(tmp_path, **fields):
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for i, colour in enumerate(list(COLOURS) * 12):
            (tmp_path / f"{i}.png").write_bytes(picture(colour, (8 + i, 9)))
            rows.writerow([f"{i}.png", colour])
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6})
    return load_data(Data(train=str(tmp_path / "list.csv"), **fields), "image-classification", processor, seed=0)


def test_pictures_are_read_from_paths_beside_the_file(tmp_path):
    data = pictures(tmp_path)
    assert data.labels == ["blue", "green", "red"]
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 6, 6)
    assert batch["pixel_values"].dtype == torch.float32

    def by_colour(batch):
        red, green, blue = batch["pixel_values"].mean(dim=(2, 3)).T
        return {"logits": torch.stack([blue, green, red], dim=1)}

    assert data.evaluate(by_colour, "test", 4)[0].value == 1.0
    assert data.example(5, 128)["pixel_values"].shape == (5, 3, 6, 6)
    assert set(data.calibration(4, 2)[0]) == {"pixel_values"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert pictures(moved).hash == data.hash
    assert data.facts["overlap_with_train"] == {"validation": 0, "test": 0}


def test_pictures_in_a_datasets_folder_and_as_grey_jpeg(tmp_path):
    grey = io.BytesIO()
    Pictures.new("L", (9, 9), 77).save(grey, "JPEG")
    rows = {"image": [{"bytes": grey.getvalue(), "path": None}, {"bytes": picture("red"), "path": None}] * 3}
    rows["label"] = ["grey", "red"] * 3
    schema = Features({"image": Image(), "label": Value("string")})
    folder = str(tmp_path / "d")
    one = Dataset.from_dict(rows, features=schema)
    DatasetDict(train=one, validation=one, test=one).save_to_disk(folder)
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6})
    data = load_data(Data(source=folder), "image-classification", processor, seed=0)
    pixels = data.train[0]["pixel_values"]
    assert np.ptp(pixels) < 0.05
    assert pixels.mean() == pytest.approx(77 / 255 * 2 - 1, abs=0.02)
    assert data.facts["overlap_with_train"] == {"validation": 6, "test": 6}


def test_a_picture_that_is_not_there_or_broken(tmp_path):
    pictures(tmp_path)
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match=rf"data.image: row 4 of .* names '3.png', but {tmp_path / '3.png'}"):
        load_data(Data(train=str(tmp_path / "list.csv")), "image-classification", None, seed=0)
    (tmp_path / "3.png").write_bytes(b"no picture")
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6})
    with pytest.raises(DataError, match=r"data.image: row 4 of .* is not a picture"):
        load_data(Data(train=str(tmp_path / "list.csv")), "image-classification", processor, seed=0)


# -- sound


def sound(path: Path, samples, rate=8000, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        scale = {1: lambda x: struct.pack("B", round(x * 127 + 128)), 2: lambda x: struct.pack("<h", round(x * 32767))}
        file.writeframes(b"".join(scale[width](x) for x in samples for _ in range(channels)))
    return path


def tones(tmp_path, **fields):
    rows = []
    for i in range(40):
        kind = ["low", "high"][i % 2]
        frequency = 200 if kind == "low" else 1500
        samples = np.sin(np.arange(600 + 10 * i) * 2 * np.pi * (frequency + i) / 8000) * 0.5
        rows.append({"audio": sound(tmp_path / f"{i}.wav", samples, width=1 + i % 3 % 2).name, "label": kind})
    spec = Data(train=jsonl(tmp_path / "a.jsonl", rows), **{"max_length": 800, **fields})
    return load_data(spec, "audio-classification", Extractor(sampling_rate=8000, return_attention_mask=True), seed=0)


def test_sounds_are_cut_padded_and_scored(tmp_path):
    data = tones(tmp_path)
    assert max(data.train.lengths) == 800
    lengths = [data.train.lengths[i] for i in range(6)]
    batch = data.collate([data.train[i] for i in range(6)])
    assert batch["input_values"].shape == (6, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    np.testing.assert_allclose(batch["input_values"][0, : lengths[0]].std(), 1, atol=1e-2)

    def crossings(batch):
        count = (batch["input_values"].diff(dim=1).sign().diff(dim=1) != 0).sum(1) / batch["attention_mask"].sum(1)
        return {"logits": torch.stack([count, torch.full_like(count, 0.15)], dim=1)}

    assert data.labels == ["high", "low"]
    assert data.evaluate(crossings, "test", 3)[0].value == 1.0
    assert data.example(2, 1000)["input_values"].shape == (2, 1000)


def test_samples_are_scaled_to_one_whatever_the_width(tmp_path):
    wanted = np.array([0.0, 0.5, -0.5, 0.25], dtype=np.float32)
    for width in (1, 2):
        table_of_one = _one_sound(sound(tmp_path / "a.wav", wanted, width=width, channels=2))
        samples, rate = read_sound(table_of_one, "audio", 0)
        assert (rate, samples.dtype) == (8000, np.float32)
        np.testing.assert_allclose(samples, wanted, atol=1e-2)
    for dtype in (np.float32, np.int32):
        scaled = wanted if dtype is np.float32 else (wanted * 2**31).astype(np.int32)
        wavfile.write(tmp_path / "b.wav", 8000, scaled)
        np.testing.assert_allclose(read_sound(_one_sound(tmp_path / "b.wav"), "audio", 0)[0], wanted, atol=1e-6)


def _one_sound(path):
    from mptrain.data.sources.tables import Table

    return Table("one", {"audio": [str(path)]})


def test_sounds_as_arrays_and_in_a_datasets_folder_are_the_same(tmp_path):
    draw = np.random.default_rng(0)
    arrays = [(draw.integers(-9999, 9999, 500) / 32768).astype(np.float32) for _ in range(4)]
    rows = [{"audio": {"array": a.tolist(), "sampling_rate": 8000}, "label": i % 2} for i, a in enumerate(arrays)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    extractor = Extractor(sampling_rate=8000)
    spec = Data(train=file, validation=file, test=file, max_length=400)
    data = load_data(spec, "audio-classification", extractor, seed=0)
    cells = []
    for array in arrays:
        stream = io.BytesIO()
        wavfile.write(stream, 8000, (array * 32768).astype(np.int16))
        cells.append({"bytes": stream.getvalue(), "path": None})
    one = Dataset.from_dict({"audio": cells, "label": [0, 1, 0, 1]}).cast_column("audio", Audio())
    DatasetDict(train=one, validation=one, test=one).save_to_disk(str(tmp_path / "d"))
    stored = load_data(Data(source=str(tmp_path / "d"), max_length=400), "audio-classification", extractor, seed=0)
    for i in range(4):
        np.testing.assert_allclose(data.test[i]["samples"], stored.test[i]["samples"], atol=1e-6)
    assert data.test[0]["samples"].shape == (400,)
    assert data.collate([data.test[0]]).keys() == {"input_values", "labels"}


@pytest.mark.parametrize("rate", [16_000, 44_100, 6_000])
def test_sounds_of_another_rate_are_resampled(tmp_path, rate):
    """A tone below both Nyquist frequencies arrives as that tone; one above the model's is not aliased."""
    seconds = np.arange(rate // 10) / rate
    tone, shrill = (np.sin(2 * np.pi * hertz * seconds) * 0.5 for hertz in (440, 6_000))
    rows = [{"audio": {"array": x.tolist(), "sampling_rate": rate}, "label": i} for i, x in enumerate((tone, shrill))]
    file = jsonl(tmp_path / "a.jsonl", rows)
    spec = Data(train=file, validation=file, test=file, max_length=800)
    data = load_data(spec, "audio-classification", Extractor(sampling_rate=8000), seed=0)
    found, filtered = (data.test[i]["samples"] for i in range(2))
    assert found.dtype == np.float32 and len(found) == 800
    wanted = np.sin(2 * np.pi * 440 * np.arange(800) / 8000) * 0.5
    np.testing.assert_allclose(found[50:-50], wanted[50:-50], atol=2e-2)
    if rate > 8000:
        assert abs(filtered[50:-50]).max() < 0.03


def test_sounds_that_do_not_fit_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"data.max_length: 128 samples are 16 ms"):
        tones(tmp_path, max_length=128)
    spec = Data(train=str(tmp_path / "a.jsonl"), max_length=800)
    (tmp_path / "7.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(DataError, match=r"row 8 of .* is not a sound that can be read"):
        load_data(spec, "audio-classification", Extractor(sampling_rate=8000), seed=0)
    bad = jsonl(tmp_path / "b.jsonl", [{"audio": ["x", "y"], "label": 0}])
    with pytest.raises(DataError, match="not one of numbers"):
        load_data(Data(train=bad), "audio-classification", Extractor(sampling_rate=8000), seed=0)
