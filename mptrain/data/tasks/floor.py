"""The floor: what a bag of words reaches on the same split.

TF-IDF of words and word pairs (sublinear term frequency) and a linear model of them, logistic or ridge regression,
fitted on train, its regularization chosen on validation, scored once on test. A network that does not beat it clearly
has learned little, however small it is made. At most 200,000 training rows, drawn by a seed, and 1,000,000 terms are
used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from mptrain.data.tasks.metrics import MEAN, Score

_STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularization
_MAX_ROWS = 200_000
_MAX_TERMS = 1_000_000

Texts = Mapping[str, tuple[Sequence[str], Sequence[Any]]]
"""{"train" | "validation" | "test": (texts, targets)}"""


@dataclass(frozen=True)
class Features:
    """Sparse rows of each split, and the targets of the training rows."""

    train: Any
    validation: Any
    test: Any
    targets: np.ndarray


def vectorizer(documents: Sequence[str]) -> TfidfVectorizer | None:
    """Fitted on the documents; None where they hold no word."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_MAX_TERMS)
    tokenize = words.build_analyzer()
    return words.fit(documents) if any(tokenize(text) for text in documents) else None


def features(texts: Texts, seed: int) -> Features | None:
    documents, targets = texts["train"][0], np.asarray(texts["train"][1])
    if len(documents) > _MAX_ROWS:
        rows = np.random.default_rng(seed).choice(len(documents), _MAX_ROWS, replace=False)
        documents, targets = [documents[i] for i in rows], targets[rows]
    words = vectorizer(documents)
    if words is None:
        return None
    train, validation, test = (words.transform(rows) for rows in (documents, texts["validation"][0], texts["test"][0]))
    return Features(train, validation, test, targets)


def tfidf_classifier(texts: Texts, seed: int = 0) -> Score | None:
    """Accuracy on "test" of logistic regression; targets: class indices. None without a word, or of a single class."""
    found = features(texts, seed)
    if found is None or len(np.unique(found.targets)) < 2:
        return None
    held_out, expected = (np.asarray(texts[split][1]) for split in ("validation", "test"))
    fitted = [_logistic(found.train, found.targets, c, seed) for c in _STRENGTHS]
    best = max(fitted, key=lambda model: (model.predict(found.validation) == held_out).mean())
    right = best.predict(found.test) == expected
    return Score("accuracy", right.astype(np.float64)[:, None], MEAN)


def tfidf_numbers(texts: Texts, seed: int = 0) -> np.ndarray | None:
    """Predictions [test] of ridge regression that is nearest on validation; targets: numbers. None without a word."""
    found = features(texts, seed)
    if found is None:
        return None
    held_out = np.asarray(texts["validation"][1])
    fitted = [Ridge(alpha=1 / c, random_state=seed).fit(found.train, found.targets) for c in _STRENGTHS]
    best = min(fitted, key=lambda model: np.abs(model.predict(found.validation) - held_out).mean())
    return best.predict(found.test)


def tfidf_labels(texts: Texts, seed: int = 0) -> np.ndarray | None:
    """Logits [test, labels] of a logistic regression to each label; targets: rows of 0 and 1. None without a word."""
    found = features(texts, seed)
    if found is None:
        return None
    held_out = np.asarray(texts["validation"][1])
    columns = []
    for label in range(held_out.shape[1]):
        targets = found.targets[:, label]
        if len(np.unique(targets)) < 2:  # always there, or never
            columns.append(np.full(found.test.shape[0], 30.0 * (2 * targets[0] - 1)))
            continue
        fitted = [_logistic(found.train, targets, c, seed) for c in _STRENGTHS]
        best = max(fitted, key=lambda m: (m.predict(found.validation) == held_out[:, label]).mean())
        columns.append(best.decision_function(found.test))
    return np.stack(columns, axis=1)


def _logistic(rows: Any, targets: np.ndarray, strength: float, seed: int) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=2000, random_state=seed).fit(rows, targets)
