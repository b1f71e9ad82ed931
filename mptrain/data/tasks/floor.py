"""The floor: what a bag of words reaches on the same split.

TF-IDF of words and word pairs (sublinear term frequency) and logistic regression, fitted on
train, its regularization chosen on validation, scored once on test. A network that does not
beat it clearly has learned little, however small it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from mptrain.data.tasks.metrics import MEAN, Score

_STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularization
_MAX_ROWS = 200_000
_MAX_TERMS = 1_000_000


def tfidf_classifier(texts: Mapping[str, tuple[Sequence[str], Sequence[int]]], seed: int = 0) -> Score | None:
    """Accuracy on "test" of the model fitted on "train" and tuned on "validation".

    Args:
        texts: {"train" | "validation" | "test": (texts, class indices)}.

    At most 200,000 training rows, drawn by `seed`, and 1,000,000 terms are used. None when
    there is nothing to fit: no word in the training texts, or a single class.
    """
    documents, labels = texts["train"]
    classes = np.asarray(labels)
    if len(documents) > _MAX_ROWS:
        rows = np.random.default_rng(seed).choice(len(documents), _MAX_ROWS, replace=False)
        documents, classes = [documents[i] for i in rows], classes[rows]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_MAX_TERMS)
    tokenize = words.build_analyzer()
    if len(np.unique(classes)) < 2 or not any(tokenize(text) for text in documents):
        return None
    features = words.fit_transform(documents)
    held_out, held_out_classes = words.transform(texts["validation"][0]), np.asarray(texts["validation"][1])
    fitted = [LogisticRegression(C=c, max_iter=2000, random_state=seed).fit(features, classes) for c in _STRENGTHS]
    best = max(fitted, key=lambda model: (model.predict(held_out) == held_out_classes).mean())
    right = best.predict(words.transform(texts["test"][0])) == np.asarray(texts["test"][1])
    return Score("accuracy", right.astype(np.float64)[:, None], MEAN)
