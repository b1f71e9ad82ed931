"""The TF-IDF floor: what it fits, tunes and scores on."""

from __future__ import annotations

import numpy as np
import pytest

from mptrain.data.tasks import floor as module
from mptrain.data.tasks.floor import tfidf_classifier as floor


def reviews(n: int, seed: int, noise: float = 0.1) -> tuple[list[str], list[int]]:
    """Texts whose class is the word pair "not good" against "so good", some with the wrong label."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, n)
    filler = [" ".join(f"w{i}" for i in rng.integers(0, 50, 6)) for _ in range(n)]
    texts = [f"{words} {'so' if c else 'not'} good" for words, c in zip(filler, classes)]
    return texts, [int(c ^ (rng.random() < noise)) for c in classes]


@pytest.fixture
def texts():
    return {"train": reviews(300, 0), "validation": reviews(100, 1), "test": reviews(200, 2)}


def test_score_is_per_example_accuracy_on_test(texts):
    score = floor(texts)
    assert (score.name, score.of.name, score.n, score.higher_is_better) == ("accuracy", "mean", 200, True)
    assert score.value > 0.8
    clean = reviews(200, 2, noise=0)[1]
    agreement = (np.array(clean) == np.array(texts["test"][1])) == (score.stats[:, 0] == 1)
    assert agreement.mean() > 0.95  # wrong exactly where the label is
    np.testing.assert_array_equal(floor(texts).stats, score.stats)


def test_test_labels_decide_nothing_but_the_score(texts):
    words, labels = texts["test"]
    flipped = floor({**texts, "test": (words, [1 - label for label in labels])})
    np.testing.assert_array_equal(flipped.stats, 1 - floor(texts).stats)


def test_regularization_is_chosen_on_validation(texts, monkeypatch):
    fitted = []

    class Spy(module.LogisticRegression):
        def predict(self, X):
            fitted.append((self.C, X.shape[0]))
            return super().predict(X)

    monkeypatch.setattr(module, "LogisticRegression", Spy)
    floor(texts)
    assert [c for c, rows in fitted if rows == 100] == [1.0, 4.0, 16.0]
    assert len([c for c, rows in fitted if rows == 200]) == 1


def test_large_training_sets_are_sampled(texts, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ROWS", 150)
    assert floor(texts, seed=1).value > 0.7


@pytest.mark.parametrize("train", [(["a text", "more text"], [1, 1]), (["!", "?"], [0, 1])])
def test_nothing_to_fit_gives_no_floor(texts, train):
    assert floor({**texts, "train": train}) is None


def test_one_wordless_text_is_no_obstacle(texts):
    words, labels = texts["train"]
    score = floor({**texts, "train": (["!", *words], [0, *labels])})
    assert score is not None and score.value > 0.8
