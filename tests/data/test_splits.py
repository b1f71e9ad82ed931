"""Splits: disjoint, whole groups, the same everywhere; and what the film reviews become."""

import bz2
import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.tiny import tokenizer

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.data.sources import packaged
from mptrain.data.sources.film_reviews import read_film_reviews
from mptrain.data.sources.splits import complete, cut, overlap, sample
from mptrain.data.sources.tables import Table
from mptrain.recipe import Data, Split

FRACTIONS = {"validation": 0.1, "test": 0.2}


@given(st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=1), st.booleans())
def test_every_row_is_in_one_split_and_no_key_crosses(keys, in_order):
    parts = cut(keys, FRACTIONS, in_order=in_order)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(keys)))
    assert all(rows == sorted(rows) for rows in parts.values())
    sides = [{keys[row] for row in rows} for rows in parts.values()]
    assert sum(map(len, sides)) == len(set(keys))
    assert len(parts["test"]) >= 0.2 * len(keys)


@given(st.lists(st.text(max_size=3), min_size=1, max_size=40), st.integers())
def test_the_side_of_a_key_does_not_depend_on_the_order_of_the_rows(keys, seed):
    shuffled = keys.copy()
    random.Random(seed).shuffle(shuffled)
    sides = [
        {name: {rows[i] for i in parts} for name, parts in cut(rows, FRACTIONS).items()} for rows in (keys, shuffled)
    ]
    assert sides[0] == sides[1]


def test_keys_go_by_their_sha256_test_first():
    keys = [f"film {i}" for i in range(20)]
    order = sorted(range(20), key=lambda i: hashlib.sha256(keys[i].encode()).hexdigest())
    parts = cut(keys, FRACTIONS)
    assert set(parts["test"]) == set(order[:4])
    assert set(parts["validation"]) == set(order[4:6])
    assert set(parts["train"]) == set(order[6:])


def test_running_text_is_cut_at_its_end():
    parts = cut([str(i) for i in range(10)], FRACTIONS, in_order=True)
    assert parts == {"train": list(range(7)), "validation": [7], "test": [8, 9]}


def test_only_missing_splits_are_cut():
    rows = Table("train.csv", {"text": [str(i) for i in range(50)]})
    own = Table("test.csv", {"text": ["x"]})
    tables = complete({"train": rows, "test": own}, rows["text"], Split())
    assert tables["test"] is own
    assert (len(tables["train"]), len(tables["validation"])) == (45, 5)


def test_too_few_groups_is_an_error_with_the_numbers():
    rows = Table("train.csv", {"text": ["a"] * 30})
    with pytest.raises(DataError, match=r"train.csv has 30 rows in 1 groups"):
        complete({"train": rows}, ["one"] * 30, Split())
    with pytest.raises(DataError, match="nothing to train on"):
        complete({"train": rows}, rows["text"], Split(validation=0.5, test=0.5))


def test_sampling_is_fixed_ascending_and_spread():
    chosen = sample(1000, 100)
    assert chosen == sample(1000, 100)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert 20 < sum(row < 500 for row in chosen) < 80
    assert sample(5, None) == sample(5, 9) == [0, 1, 2, 3, 4]


def test_overlap_counts_rows_seen_in_training():
    assert overlap({"train": ["a", "b"], "validation": ["c"], "test": ["a", "a", "d"]}) == {"validation": 0, "test": 2}


@pytest.fixture
def reviews(tmp_path):
    """300 reviews of 30 films, a repeat, a contradiction, an empty one and a plot summary."""
    lines = ["category,text,movie_name,has_plot_and_reviews"]
    words = ["good", "bad", "fine", "poor", "great", "film", "plot", "cast"]
    for i in range(300):
        text = f"the {words[i % 8]} film number {i}"
        lines.append(f"{'fresh' if i % 3 else 'rotten'},{text},film_{i % 30},True")
    lines += ["fresh,the bad film number 1,another,True", "rotten,both,film_1,True", "fresh,both,film_2,True"]
    lines += ['fresh,"  ",film_3,True', 'plot,"A long, long plot",film_4,True', 'rotten,"Spaces  inside",film_4,True']
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(bz2.compress("\n".join(lines).encode()))
    return path


def test_film_reviews_lose_plots_repeats_and_contradictions(reviews):
    table, dropped = read_film_reviews(reviews)
    assert dropped == {"rows_read": 304, "duplicates_dropped": 2, "conflicting_dropped": 1}
    assert len(table) == len(set(table["text"])) == 301
    assert "both" not in table["text"]
    assert table["text"][-1] == "Spaces inside"
    assert (table.rows[0], table.rows[-1]) == (1, 306), "numbered as in the file"
    assert set(table["label"]) == {"fresh", "rotten"}


def test_packaged_reviews_are_split_by_film(reviews, monkeypatch):
    monkeypatch.setattr(packaged, "fetch", lambda reference: reviews)
    data = load_data(
        Data(source="packaged:film-reviews", max_length=32, max_unknown=1.0), "text-classification", tokenizer(), seed=1
    )
    assert data.labels == ["fresh", "rotten"]
    assert data.facts["duplicates_dropped"] == 2
    assert data.facts["overlap_with_train"] == {"validation": 0, "test": 0}
    assert data.facts["groups"]["column"] == "film"
    assert data.facts["groups"]["crossing"] == 0
    assert data.facts["rows"]["test"] >= 0.2 * 301
    table, _ = read_film_reviews(reviews)
    film = dict(zip(table["text"], table["film"]))
    films = {name: {film[text] for text in texts} for name, (texts, _) in data.texts.items()}
    assert not films["train"] & films["test"]
    assert not films["train"] & films["validation"]
    assert not films["validation"] & films["test"]
    # Another seed of the run must not move the test set.
    again = load_data(
        Data(source="packaged:film-reviews", max_length=32, max_unknown=1.0), "text-classification", tokenizer(), seed=2
    )
    assert (again.hash, again.texts) == (data.hash, data.texts)


def test_packaged_reviews_refuse_split_names(reviews, monkeypatch):
    monkeypatch.setattr(packaged, "fetch", lambda reference: reviews)
    with pytest.raises(DataError, match=r"data.test: packaged:film-reviews comes as one table"):
        load_data(Data(source="packaged:film-reviews", test="x"), "text-classification", tokenizer(), seed=1)
    with pytest.raises(DataError, match="packaged:minilm-l6 is not a data set"):
        load_data(Data(source="packaged:minilm-l6"), "text-classification", tokenizer(), seed=1)
