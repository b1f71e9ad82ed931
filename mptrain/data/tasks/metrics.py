"""Scores that keep what every example contributed, so that intervals and paired differences can be drawn.

A metric is a function of the column means of `stats` [n, k], one row per example:
    mean       accuracy, exact match, answer F1      c0
    f1         entity F1, micro-averaged             2·tp / (2·tp + fp + fn),  columns tp, fp, fn
    ratio      loss per token                        Σc0 / Σc1
    exp_ratio  perplexity                            exp(Σc0 / Σc1)
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Score:
    """One metric of one model on one split."""

    name: str
    stats: np.ndarray
    """float64 [n, k], one row per example, in data-set order"""
    reduce: Literal["mean", "f1", "ratio", "exp_ratio"]
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        return self.value_of(self.stats)

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.stats)

    def value_of(self, stats: np.ndarray) -> float:
        """The metric of other examples (a bootstrap resample), stats [m, k]; nan without examples."""
        if len(stats) == 0:
            return float("nan")
        # Means, not sums: a bootstrap may pass the column means as a single row.
        mean = stats.mean(axis=0)
        if self.reduce == "mean":
            return float(mean[0])
        if self.reduce == "f1":
            true, spurious, missed = mean
            whole = 2 * true + spurious + missed
            return float(2 * true / whole) if whole else 0.0
        ratio = mean[0] / mean[1] if mean[1] else float("nan")
        with np.errstate(over="ignore"):  # a broken model has perplexity inf, which is the answer
            return float(np.exp(ratio) if self.reduce == "exp_ratio" else ratio)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The spans (first word, last word + 1, type) of one sentence of BIO tags.

    As CoNLL's evaluation reads them: an entity begins at B-X, and at I-X that does not continue
    an entity of type X. Tags without prefix other than O count as I, so runs of equal tags form spans.
    """
    found = set()
    start, kind = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, dash, rest = tag.partition("-")
        if not (dash and prefix in ("B", "I")):
            prefix, rest = ("O", "") if tag == "O" else ("I", tag)
        if kind and (prefix != "I" or rest != kind):
            found.add((start, position, kind))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = position, rest
    return found


def span_counts(predicted: Sequence[str], gold: Sequence[str]) -> tuple[int, int, int]:
    """Entities of one sentence that are right, spurious and missed: (tp, fp, fn)."""
    guessed, true = entities(predicted), entities(gold)
    return len(guessed & true), len(guessed - true), len(true - guessed)


def normalize_answer(text: str) -> str:
    """SQuAD's normalization (Rajpurkar et al. 2016): lower case; no punctuation, articles or extra spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(predicted: str, gold: Sequence[str]) -> tuple[float, float]:
    """(F1 over words, exact match) of an answer, each the best over the gold answers; no gold answer means ""."""
    guess = normalize_answer(predicted)
    pairs = [(guess, normalize_answer(answer)) for answer in gold or [""]]
    return max(_word_f1(a, b) for a, b in pairs), float(max(a == b for a, b in pairs))


def _word_f1(a: str, b: str) -> float:
    x, y = a.split(), b.split()
    if not x or not y:
        return float(x == y)
    common = sum((Counter(x) & Counter(y)).values())
    return 2 * common / (len(x) + len(y))
