"""Scores against other ways to compute them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mptrain.core.errors import MptrainError
from mptrain.data.tasks.metrics import (
    EXP_RATIO,
    F1,
    MEAN,
    RATIO,
    Score,
    answer_scores,
    entities,
    normalize_answer,
    span_counts,
)

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def chunks_word_by_word(tags):
    """conlleval's rule, told word by word: a word begins a chunk, continues the one before, or is outside."""
    found = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        kind = tag[2:]
        if tag[0] == "I" and found and found[-1][1] == i and found[-1][2] == kind:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1, kind])
    return {tuple(chunk) for chunk in found}


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_conlleval_chunks(tags):
    assert entities(tags) == chunks_word_by_word(tags)


def test_entities_by_hand():
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == {
        (0, 2, "PER"),
        (3, 4, "LOC"),
        (4, 5, "LOC"),
        (5, 6, "PER"),
    }
    assert entities(["B-a-b", "I-a-b"]) == {(0, 2, "a-b")}
    assert entities(["NOUN", "NOUN", "VERB"]) == {(0, 2, "NOUN"), (2, 3, "VERB")}
    assert entities([]) == set()


def test_entity_f1_is_micro_averaged():
    gold = ["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]
    guess = ["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]
    stats = np.array([span_counts(g, t) for g, t in zip(guess, gold)], dtype=np.float64)
    assert stats.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert Score("f1", stats, F1).value == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    # Of single words, it is the binary F1 of scikit-learn.
    truth, found = np.random.default_rng(0).integers(0, 2, (2, 50))
    rows = [span_counts(["B-X" if f else "O"], ["B-X" if t else "O"]) for f, t in zip(found, truth)]
    assert Score("f1", np.array(rows, dtype=np.float64), F1).value == pytest.approx(f1_score(truth, found))


def test_values_of_every_reduction_and_of_resamples():
    stats = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]])
    assert Score("accuracy", stats[:, :1], MEAN).value == pytest.approx(4 / 3)
    assert Score("loss", stats, RATIO, "number", False).value == pytest.approx(4 / 7)
    perplexity = Score("perplexity", stats, EXP_RATIO, "number", False)
    assert perplexity.value == pytest.approx(np.exp(4 / 7))
    assert perplexity.of(stats[[0, 0]]) == pytest.approx(np.exp(0.5))
    assert perplexity.of(stats.mean(axis=0)[None]) == pytest.approx(perplexity.value)
    assert (perplexity.n, perplexity.higher_is_better) == (3, False)


def test_values_at_the_edges():
    assert np.isnan(Score("accuracy", np.zeros((0, 1)), MEAN).value)
    assert Score("f1", np.zeros((4, 3)), F1).value == 0.0
    assert np.isnan(Score("loss", np.zeros((2, 2)), RATIO).value)
    assert Score("perplexity", np.array([[1e6, 1.0]]), EXP_RATIO).value == float("inf")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a  an the  ", ""),
        ("Anne's theory", "annes theory"),
        ("U.S.-based", "usbased"),
        ("1,000", "1000"),
    ],
)
def test_squad_normalization(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("guess", "gold", "f1", "exact"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1, 1),
        ("Eiffel", ["Eiffel Tower", "the Tower"], 2 / 3, 0),
        ("tower tower", ["Eiffel Tower"], 0.5, 0),
        ("Paris", ["London"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_answer_scores_by_hand(guess, gold, f1, exact):
    assert answer_scores(guess, gold) == (pytest.approx(f1), exact)


def test_scores_that_a_run_folder_kept_before_are_read():
    for old, value, unit in (
        ({"name": "accuracy", "stats": [[1.0], [0.0]], "reduce": "mean", "higher": True}, 0.5, "fraction"),
        ({"name": "perplexity", "stats": [[2.0, 1.0]], "reduce": "exp_ratio", "higher": False}, np.exp(2.0), "number"),
    ):
        score = Score.from_kept(old, {})
        assert (score.value, score.unit, score.higher_is_better) == (pytest.approx(value), unit, old["higher"])
    with pytest.raises(MptrainError, match="computed by 'gone', which its task no longer has"):
        Score.from_kept({"name": "x", "stats": [[1.0]], "of": "gone", "unit": "number", "higher": True}, {})
