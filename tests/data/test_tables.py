"""Files, `datasets` folders and column options: what is read, and what is said when it cannot be."""

import bz2
import gzip
import itertools
import json
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value, disable_progress_bars
from kit.tiny import tokenizer

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.data.sources.tables import read_table
from mptrain.data.tasks.labels import Column, class_lines, classes_of
from mptrain.models.samples import texts_for
from mptrain.recipe import Data, Split

disable_progress_bars()

ROWS = [("a good film", "fresh"), ('so "bad"', "rotten"), ("NA", "1e5"), ("two\nlines, one cell", "fresh")]
TASK = "text-classification"


def write_csv(path, rows, header="text,label"):
    cells = ["".join(["", *(f'"{str(c).replace(chr(34), chr(34) * 2)}",' for c in row)])[:-1] for row in rows]
    path.write_text("\n".join([header, *cells]) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), encoding="utf-8")
    return path


def load(tmp_path, task=TASK, **fields):
    """The texts here have numbers and names, which the small vocabulary lacks."""
    return load_data(Data(max_length=32, max_unknown=1.0, **fields), task, tokenizer(), seed=0)


def reviews(n, salt=""):
    return [(f"the {'good' if i % 2 else 'bad'} film {salt}{i}", ["neg", "pos"][i % 2]) for i in range(n)]


# -- files


def test_every_format_gives_the_same_cells(tmp_path):
    csv_file = write_csv(tmp_path / "a.csv", ROWS)
    jsonl = write_jsonl(tmp_path / "a.jsonl", ROWS)
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}), parquet)
    zipped = tmp_path / "a.csv.gz"
    zipped.write_bytes(gzip.compress(csv_file.read_bytes()))
    packed = tmp_path / "a.jsonl.bz2"
    packed.write_bytes(bz2.compress(jsonl.read_bytes()))
    for path in (csv_file, jsonl, parquet, zipped, packed):
        table = read_table(str(path), "data.train")
        assert list(zip(table["text"], table["label"])) == ROWS, path.name


def test_a_tsv_has_no_quoting_and_keeps_every_mark(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"an open quote\t0\nit\'s "fine"\t1\n')
    assert read_table(str(tmp_path / "a.tsv"), "data.train")["text"] == ['"an open quote', 'it\'s "fine"']


def test_a_file_without_header_is_read_by_position(tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in reviews(40)))
    data = load(tmp_path, train=str(tmp_path / "a.tsv"), text="column 1", label="column 2")
    assert sum(data.facts["rows"].values()) == 40
    assert data.labels == ["neg", "pos"]


def test_a_byte_order_mark_blank_lines_and_long_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\n\n" + b"x" * 300_000 + b",1\n\n")
    table = read_table(str(tmp_path / "a.csv"), "data.train")
    assert list(table.columns) == ["text", "label"]
    assert len(table["text"][0]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text,label\none\n", "line 2 has 1 fields, the first line has 2"),
        ("a.csv", b'text,label\n"one,1\n', "could not be read as csv"),
        ("a.csv", b'text,label\n"one" two,1\n', "could not be read as csv"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "could not be read as csv"),
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.jsonl", b'{"text": 1}\n{"text": \n', "line 2: "),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.parquet", b"PAR1", "could not be read as parquet"),
        ("a.csv.gz", b"text,label\n", "could not be read as csv"),
        ("a.xlsx", b"", "none of the formats"),
        ("noending", b"", "none of the formats"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_paragraph(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / name), "data.validation")
    assert said in str(caught.value)
    assert str(caught.value).startswith("data.validation: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=str(tmp_path / "none.csv")):
        load(tmp_path, train="none.csv")


# -- splits from files


def test_splits_that_are_given_are_kept_and_overlap_is_told(tmp_path, caplog):
    files = {
        "train": write_csv(tmp_path / "train.csv", reviews(20)),
        "validation": write_csv(tmp_path / "dev.csv", reviews(6, "v")),
        "test": write_csv(tmp_path / "test.csv", reviews(3) + reviews(5, "t")),
    }
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, **{name: str(file) for name, file in files.items()})
    assert data.facts["rows"] == {"train": 20, "validation": 6, "test": 8}
    assert data.facts["cut_from_train"] == {}
    assert data.facts["overlap_with_train"] == {"validation": 0, "test": 3}
    assert "3 of 8 test rows also occur in train" in caplog.text
    assert data.facts["labels"]["train"] == {"neg": 10, "pos": 10}


def test_cutting_keeps_equal_texts_on_one_side(tmp_path):
    file = write_csv(tmp_path / "a.csv", reviews(100) * 3)
    data = load(tmp_path, train=str(file))
    assert data.facts["overlap_with_train"] == {"validation": 0, "test": 0}
    assert data.facts["cut_from_train"] == {"validation": 0.1, "test": 0.2}
    assert sum(data.facts["rows"].values()) == 300


def test_groups_never_cross(tmp_path, caplog):
    rows = [(*row, f"film {i % 15}") for i, row in enumerate(reviews(150))]
    file = write_csv(tmp_path / "a.csv", rows, "text,label,film")
    data = load(tmp_path, train=str(file), split=Split(group="film"))
    assert data.facts["groups"] == {"column": "film", "train": 10, "validation": 2, "test": 3, "crossing": 0}
    assert not [record for record in caplog.records if record.name == "mptrain.data.load"]
    with pytest.raises(DataError, match=r"data.split.group: .* Did you mean 'film'"):
        load(tmp_path, train=str(file), split=Split(group="films"))


def test_groups_that_cross_given_splits_are_told(tmp_path, caplog):
    first = write_csv(tmp_path / "a.csv", [(*row, f"f{i % 5}") for i, row in enumerate(reviews(50))], "text,label,film")
    second = write_csv(tmp_path / "b.csv", [(*row, "f1") for row in reviews(9, "t")], "text,label,film")
    data = load(tmp_path, train=str(first), test=str(second), split=Split(group="film"))
    assert data.facts["groups"]["crossing"] == 1
    assert "1 groups of film occur in more than one split" in caplog.text


def test_max_samples_caps_every_split_and_keeps_the_labels(tmp_path):
    rows = sorted(reviews(200), key=lambda row: row[1])
    whole = load(tmp_path, train=str(write_csv(tmp_path / "a.csv", rows)))
    data = load(tmp_path, train=str(tmp_path / "a.csv"), max_samples=10)
    assert data.facts["examples"] == {"train": 10, "validation": 10, "test": 10}
    assert data.facts["max_samples"] == 10
    assert data.labels == whole.labels
    assert set(data.texts["test"][0]) <= set(whole.texts["test"][0])
    assert len(set(data.texts["train"][1])) == 2, "a sorted file still gives both classes"


# -- the hash


def test_the_hash_is_of_the_content_and_not_of_the_path(tmp_path):
    first = load(tmp_path, train=str(write_csv(tmp_path / "a.csv", reviews(50))))
    moved = load(tmp_path, train=str(write_jsonl(tmp_path / "b.jsonl", reviews(50))))
    assert first.hash == moved.hash
    other_label = [("the bad film 0", "pos"), *reviews(50)[1:]]
    other_text = [("the bad film zero", "neg"), *reviews(50)[1:]]
    hashes = {load(tmp_path, train=str(write_csv(tmp_path / "c.csv", rows))).hash for rows in (other_label, other_text)}
    resplit = load(tmp_path, train=str(tmp_path / "a.csv"), split=Split(test=0.4))
    assert len({first.hash, *hashes, resplit.hash}) == 4


# -- labels


def test_labels_may_be_text_or_numbers_and_numbers_sort_by_value(tmp_path):
    rows = [(f"film {i}", i % 12) for i in range(120)]
    from_json = load(tmp_path, train=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    from_csv = load(tmp_path, train=str(write_csv(tmp_path / "a.csv", rows)))
    assert from_json.labels == from_csv.labels == [str(i) for i in range(12)]
    assert from_json.hash == from_csv.hash
    text, label = from_json.texts["test"][0][0], from_json.texts["test"][1][0]
    assert label == int(text.split()[1]) % 12


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "row 1 has None where a class label"),
        ("", "row 1 has '' where a class label"),
        (0.5, "row 1 has 0.5 where a class label"),
        (
            "maybe",
            "1 of 1 labels of test are classes that the training split does not have ('maybe': 1; first",
        ),
        (-1, "does not have ('-1': 1; first in row 1)"),
    ],
)
def test_a_label_that_cannot_be_used_names_row_and_value(tmp_path, label, said):
    train = write_jsonl(tmp_path / "a.jsonl", reviews(60))
    test = write_jsonl(tmp_path / "t.jsonl", [("new", label)])
    with pytest.raises(DataError) as caught:
        load(tmp_path, train=str(train), test=str(test))
    assert said in str(caught.value)
    assert "t.jsonl" in str(caught.value)


@pytest.mark.parametrize("row", [1, 37, 111, 200])
@pytest.mark.parametrize(("cell", "said"), [((None, "pos"), "data.text"), (("new", None), "data.label")])
def test_the_row_named_is_that_of_the_file_when_splits_are_cut(tmp_path, row, cell, said):
    rows = reviews(200)
    rows[row - 1] = cell
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"{said}.*\brow {row} .*None"):
        load(tmp_path, train=str(file))


def test_the_row_of_a_label_that_training_lacks_is_that_of_the_file(tmp_path, caplog):
    whole = load(tmp_path, train=str(write_csv(tmp_path / "a.csv", reviews(200))))
    number = 1 + [text for text, _ in reviews(200)].index(whole.texts["test"][0][-1])
    rows = reviews(200)
    rows[number - 1] = (rows[number - 1][0], "maybe")
    load(tmp_path, train=str(write_csv(tmp_path / "a.csv", rows)))
    assert f"not have ('maybe': 1; first in row {number})" in caplog.text


def test_a_sample_of_a_sample_keeps_the_numbers_of_its_rows(tmp_path):
    table = read_table(str(write_csv(tmp_path / "a.csv", reviews(20))), "data.train")
    assert list(table.rows) == list(range(1, 21))
    part = table.take([3, 7, 19]).choose({"text": "text"}).take([2, 0])
    assert part.rows == [20, 4]
    assert part.place("text", 0) == f"data.text: row 20 of data.train ({tmp_path / 'a.csv'})"
    assert len(table.take([]).rows) == 0


def test_numbers_of_one_value_have_one_order():
    for labels in itertools.permutations(["1", "01", "2", "02", "-0", "0"]):
        found = classes_of({"train": Column(labels, range(1, 7), None, "data.label")}, None, "data.label")
        assert found.names == ["-0", "0", "01", "1", "02", "2"]


NAMED = {"train": ["a", "b", "a", "b", "a"], "validation": ["a", "b", "a"], "test": ["b", "c", "d", "a", "b", "b", "c"]}


def classed(given=None, **changes):
    columns = {s: Column(v, range(1, len(v) + 1), None, f"data.label ({s}.csv)") for s, v in (NAMED | changes).items()}
    return classes_of(columns, given, "data.label")


def test_classes_that_training_lacks_are_counted_and_come_behind_all_others(caplog):
    found = classed()
    assert (found.names, found.unseen) == (["a", "b"], ["c", "d"])
    assert found.indices == {"train": [0, 1, 0, 1, 0], "validation": [0, 1, 0], "test": [1, 2, 3, 0, 1, 1, 2]}
    assert found.counts["test"] == {"a": 1, "b": 3, "c": 2, "d": 1}
    (said,) = caplog.messages
    assert "3 of 7 labels of test are classes that the training split does not have ('c': 2, 'd': 1; first in" in said


def test_data_labels_names_the_classes_in_their_order(caplog):
    found = classed(["d", "c", "b", "a", 5])
    assert (found.names, found.unseen) == (["d", "c", "b", "a", "5"], [])
    assert found.indices["train"] == [3, 2, 3, 2, 3]
    assert not caplog.messages
    with pytest.raises(DataError, match=r"test.csv\): row 3 has the label 'd', which data.labels does not"):
        classed(["a", "b", "c"])
    with pytest.raises(DataError, match=r"data.labels: 'a' is there twice"):
        classed(["a", "b", "a"])
    with pytest.raises(DataError, match=r"data.labels: a classifier needs at least two classes, got \['a'\]"):
        classed(["a"])


def test_rows_of_a_class_without_an_output_count_as_errors(tmp_path, caplog):
    train = str(write_jsonl(tmp_path / "a.jsonl", reviews(60)))
    rows = [("good film", "pos"), ("bad film", "neg"), ("fine film", "maybe"), ("the film", "neg")]
    test = str(write_jsonl(tmp_path / "t.jsonl", rows))
    data = load(tmp_path, train=train, validation=train, test=test)
    assert (data.labels, data.unseen) == (["neg", "pos"], ["maybe"])
    assert "count as errors, unless data.labels names them" in caplog.text
    logits = {"pos": [0.0, 3.0], "neg": [3.0, 0.0], "maybe": [0.0, 0.0]}
    by_length = [logits[label] for text, label in sorted(rows, key=lambda row: -len(row[0].split()))]
    accuracy, loss = data.evaluate(lambda b: {"logits": torch.tensor(by_length)}, "test")
    assert accuracy.stats[:, 0].tolist() == [1, 1, 0, 1]
    assert loss.value == pytest.approx(math.log1p(math.exp(-3)))
    whole = load(tmp_path, train=train, validation=train, test=test, labels=["neg", "pos", "maybe"])
    assert (whole.labels, whole.unseen) == (["neg", "pos", "maybe"], [])
    logits = [[*row, 5.0 if row == [0.0, 0.0] else -5.0] for row in by_length]
    accuracy, loss = whole.evaluate(lambda b: {"logits": torch.tensor(logits)}, "test")
    assert accuracy.value == 1.0 and loss.stats.shape == (4, 1)
    assert whole.hash != data.hash
    other = str(write_jsonl(tmp_path / "o.jsonl", [*rows[:2], ("fine film", "other"), rows[3]]))
    assert load(tmp_path, train=train, validation=train, test=other).hash != data.hash
    with pytest.raises(DataError, match=r"data.labels: the task causal-lm does not use it"):
        load(tmp_path, "causal-lm", train=train, labels=["a", "b"])


def test_spellings_of_one_class_are_named(caplog):
    classed(train=["DESC", "DESC ", "desc", "ENTY", "de sc"], validation=["ENTY"], test=["desc"])
    (said,) = caplog.messages
    assert "3 classes differ in case or spaces only ('DESC': 1, 'DESC ': 1, 'desc': 2). Write them alike" in said


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            ["a", "b", "a|b", "b|c", "a|b"],
            "2 of 4 classes look like several in one cell, joined by '|' ('a|b', 'b|c';",
        ),
        (["x;y", "y;z", "x;z", "x;y"], "3 of 3 classes look like several in one cell, joined by ';'"),
        (["sport", "news", "news/sport"], "1 of 3 classes look like several in one cell, joined by '/'"),
        (["and/or", "news", "R&B", "s|t", "C++"], None),
    ],
)
def test_cells_that_hold_several_classes_are_named(labels, said, caplog):
    classed(train=labels, validation=labels[:1], test=labels[:1])
    assert (said in caplog.text) if said else not caplog.messages


def test_classes_are_listed_with_their_counts():
    assert class_lines(classed().counts) == [
        "class       train  validation        test",
        "'a'             3           2           1",
        "'b'             2           1           3",
        "'c'             0           0           2",
        "'d'             0           0           1",
    ]
    many = {"train": {str(i): 100 - i for i in range(40)}}
    lines = class_lines(many, most=10)
    assert len(lines) == 12 and lines[-1] == f"and 30 classes more, {sum(range(61, 91)):,} in all"


def test_other_separators_are_named_not_the_line_that_they_break(tmp_path):
    rows = "".join(f"a {i}, good film;pos\n" if i == 80 else f"film {i};pos\n" for i in range(100))
    for name, head, text, said in (
        (
            "a.csv",
            "text;label\n",
            rows,
            r"columns \(text, label\) are separated by semicolons \(;\), not by commas",
        ),
        ("a.csv", '"text"\t"label"\n', rows.replace(";", "\t"), "separated by tabs, not by commas: name it .tsv"),
        ("a.tsv", "text,label\n", rows.replace(",", "").replace(";", ","), "commas, not by tabs: name it .csv"),
        ("a.csv", "text|label\n", rows.replace(";", "|"), r"separated by bars \(\|\), not by commas"),
    ):
        (tmp_path / name).write_text(head + text)
        with pytest.raises(DataError, match=said):
            load(tmp_path, train=str(tmp_path / name))
    (tmp_path / "a.csv").write_text(rows)
    with pytest.raises(DataError, match="separated by semicolons"):
        load(tmp_path, train=str(tmp_path / "a.csv"), text="column 1", label="column 2")
    (tmp_path / "b.csv").write_text("text\n" + "a; b\n" * 30)
    assert load(tmp_path, "causal-lm", train=str(tmp_path / "b.csv")).facts["rows"]["train"] == 21


def test_a_label_column_with_one_value_or_all_different_is_the_wrong_one(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(*row, i, "x") for i, row in enumerate(reviews(50))], "text,label,id,const")
    with pytest.raises(DataError, match=r"data.label .*not a column of class labels"):
        load(tmp_path, train=str(file), label="id")
    with pytest.raises(DataError, match=r"at least two labels, the training split has \['x'\]"):
        load(tmp_path, train=str(file), label="const")


# -- columns


def test_a_missing_column_lists_those_there_are(tmp_path):
    file = write_csv(tmp_path / "a.csv", reviews(20), "sentence,label")
    with pytest.raises(DataError, match=r"data.text: data.train .*a.csv.* has no column 'text'.* sentence, label"):
        load(tmp_path, train=str(file))
    with pytest.raises(DataError, match="Did you mean 'sentence'"):
        load(tmp_path, train=str(file), text="sentense")
    assert load(tmp_path, train=str(file), text="sentence").labels == ["neg", "pos"]


def test_an_option_the_task_does_not_use_is_an_error(tmp_path):
    file = str(write_csv(tmp_path / "a.csv", reviews(20)))
    with pytest.raises(DataError, match=r"data.tags: the task text-classification does not use it"):
        load(tmp_path, train=file, tags="label")
    with pytest.raises(DataError, match=r"data.stride"):
        load(tmp_path, train=file, stride=5)
    with pytest.raises(DataError, match=r"data.config"):
        load(tmp_path, train=file, config="x")


def test_a_text_cell_that_is_no_text_names_its_row(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*reviews(30), (7, "pos")])
    with pytest.raises(DataError, match=r"data.text: row \d+ of .* holds 7 where text is needed"):
        load(tmp_path, train=str(file))


HALF = "good \ud83d film"


@pytest.mark.parametrize("row", [1, 12, 31])
def test_half_a_character_names_its_column_and_row(tmp_path, row):
    rows = reviews(31)
    rows[row - 1] = (HALF, "pos")
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    said = rf"data.text: row {row} of .*a.jsonl\) holds '\\ud83d', half of a character .*after 'good '\). Remove"
    with pytest.raises(DataError, match=said):
        load(tmp_path, train=str(file))
    with pytest.raises(DataError, match=said):
        load(tmp_path, "causal-lm", train=str(file))
    rows[row - 1] = ("good \U0001f600 film", "pos")
    load(tmp_path, train=str(write_jsonl(tmp_path / "a.jsonl", rows)))


def test_half_a_character_in_a_label_a_path_or_a_file_of_samples(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*reviews(30), ("new", HALF)])
    with pytest.raises(DataError, match=r"data.label .*a.jsonl\)\): row 31 holds '\\ud83d'"):
        load(tmp_path, train=str(file))
    with pytest.raises(DataError, match=r"data.image: row 1 of .* holds '\\ud83d'"):
        load(tmp_path, "image-classification", train=str(write_jsonl(file, [(HALF, "pos")])), image="text")
    with pytest.raises(DataError, match=r"--data .*: row 2, column 'text' holds '\\ud83d'"):
        texts_for(str(write_jsonl(file, [("good", "pos"), (HALF, "pos")])))


def test_more_tokens_than_the_model_reads_is_an_error(tmp_path):
    file = write_csv(tmp_path / "a.csv", reviews(20))
    with pytest.raises(DataError, match=r"data.max_length: 100 is more than the 64 tokens"):
        load_data(Data(train=str(file), max_length=100), TASK, tokenizer(), seed=0)


# -- sources


def features():
    return Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})


def table(n, salt=""):
    texts, labels = zip(*reviews(n, salt))
    return Dataset.from_dict({"text": texts, "label": [["pos", "neg"].index(y) for y in labels]}, features=features())


def test_a_saved_datasets_folder_with_declared_names(tmp_path):
    DatasetDict(train=table(40), dev=table(8, "v"), test=table(9, "t")).save_to_disk(tmp_path / "d")
    before = sorted(p for p in tmp_path.rglob("*"))
    data = load(tmp_path, source=str(tmp_path / "d"))
    assert data.labels == ["pos", "neg"], "in the declared order, not the alphabet's"
    assert data.facts["rows"] == {"train": 40, "validation": 8, "test": 9}
    assert data.texts["test"][1][0] == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before, "no cache files"
    named = load(tmp_path, source=str(tmp_path / "d"), train="train", test="dev")
    assert named.facts["rows"]["test"] == 8
    assert named.facts["cut_from_train"] == {"validation": 0.1}
    with pytest.raises(DataError, match=r"data.test: .* has no split 'tset'; its splits are train, dev, test"):
        load(tmp_path, source=str(tmp_path / "d"), train="train", test="tset")


def test_a_single_saved_table_and_hidden_labels(tmp_path):
    table(60).save_to_disk(tmp_path / "one")
    assert load(tmp_path, source=str(tmp_path / "one")).facts["cut_from_train"] == {"validation": 0.1, "test": 0.2}
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features())
    DatasetDict(train=table(40), test=hidden).save_to_disk(tmp_path / "h")
    with pytest.raises(DataError, match=r"row 1 has the label -1.*hidden"):
        load(tmp_path, source=str(tmp_path / "h"))


def test_parquet_keeps_declared_names(tmp_path):
    table(40).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path, train=str(tmp_path / "a.parquet"))
    assert data.labels == ["pos", "neg"]
    assert data.hash == load(tmp_path, source=_saved(tmp_path, table(40))).hash


def test_declared_names_of_tag_lists(tmp_path):
    schema = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "B-X"]))})
    rows = {"tokens": [["film", f"w{i}"] for i in range(30)], "tags": [[1, 0]] * 30}
    data = load(tmp_path, "token-classification", source=_saved(tmp_path, Dataset.from_dict(rows, features=schema)))
    assert data.labels == ["O", "B-X"]


def _saved(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_source_that_is_not_there_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'owner/missing'}, and the hub data set"):
        load(tmp_path, source="owner/missing")
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'a/b/c'}, and 'a/b/c' is not a hub name"):
        load(tmp_path, source="a/b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a folder that `datasets` saved"):
        load(tmp_path, source="empty")
    with pytest.raises(DataError, match=r"is a file; name files in data.train"):
        load(tmp_path, source=str(write_csv(tmp_path / "a.csv", reviews(3))))
    with pytest.raises(DataError, match=r"data.train: no training data is given"):
        load(tmp_path, test=str(tmp_path / "a.csv"))


def test_names_on_the_hub_go_to_datasets_with_config_and_slices(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split=None):
        asked.append((name, config, split))
        return table(40, split or "") if split else DatasetDict(train=table(40), validation=table(5, "v"))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load(tmp_path, source="glue", config="sst2").facts["rows"]["validation"] == 5
    data = load(tmp_path, source="glue", config="sst2", train="train[:10%]", test="validation")
    assert data.facts["rows"]["test"] == 40
    assert asked == [("glue", "sst2", None), ("glue", "sst2", "train[:10%]"), ("glue", "sst2", "validation")]
