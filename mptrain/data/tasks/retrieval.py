"""How well queries find what belongs to them among candidates, by similarity.

    recall@k  1 where one of the k most similar candidates is relevant (R@k of metric learning), else 0
    mrr       1 / rank of the first relevant candidate
    ndcg@10   Σ_{i ≤ 10} rel_i / log2(i + 1), over that of the best order

each the mean over queries. A candidate that is as similar as a relevant one counts as before it, so a model that maps
all texts to one vector finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mptrain.data.tasks.metrics import MEAN, Score

TOP = 10
RECALLS = (1, 5, 10)
_CHUNK = 512  # queries at a time, against all candidates
_TIE = 1e-9

Similar = Callable[[slice], np.ndarray]
"""queries [c] to their similarities [c, candidates]"""
Relevant = Callable[[slice], np.ndarray]
"""queries [c] to 1 for a relevant candidate, 0 for another, −1 for one that is not asked, int8 [c, candidates]"""


def retrieval(queries: int, similar: Similar, relevant: Relevant) -> list[Score]:
    """Scores per query; every query has a relevant candidate."""
    rows = list(_rows(queries, similar, relevant))
    ndcg, mrr, *recalls = (np.concatenate(column)[:, None] for column in zip(*rows))
    named = [Score(f"recall@{k}", column, MEAN) for k, column in zip(RECALLS, recalls)]
    return [Score(f"ndcg@{TOP}", ndcg, MEAN), Score("mrr", mrr, MEAN), *named]


def _rows(queries: int, similar: Similar, relevant: Relevant) -> Iterator[list[np.ndarray]]:
    for start in range(0, queries, _CHUNK):
        part = slice(start, min(start + _CHUNK, queries))
        kinds = relevant(part)
        wanted = kinds == 1
        scores = np.where(kinds < 0, -np.inf, similar(part).astype(np.float64) - _TIE * wanted)
        first = 1 + (scores > np.where(wanted, scores, -np.inf).max(1, keepdims=True)).sum(1)
        count = min(TOP, scores.shape[1])
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        hits = np.take_along_axis(wanted, np.take_along_axis(top, order, 1), 1)
        gain = 1 / np.log2(np.arange(2, count + 2))
        best = np.cumsum(gain)[np.minimum(wanted.sum(1), count) - 1]
        yield [(hits * gain).sum(1) / best, 1 / first, *((first <= k).astype(np.float64) for k in RECALLS)]
