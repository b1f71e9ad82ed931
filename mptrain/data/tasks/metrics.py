"""Scores that keep what every example contributed, so that intervals and paired differences can be drawn.

A score is a measure of `stats` [n, k], one row per example. A measure is any function of all the rows, or, which
makes resamples cheap, of their column means:
    mean       accuracy, exact match, answer F1      c0
    f1         entity F1, micro-averaged             2·tp / (2·tp + fp + fn),  columns tp, fp, fn
    ratio      loss per token                        Σc0 / Σc1
    exp_ratio  perplexity                            exp(Σc0 / Σc1)
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mptrain.core.errors import MptrainError

Unit = Literal["fraction", "coefficient", "number"]
"""How a score reads, and what a drop of it means: a fraction in percent, and points of it; a coefficient of a fixed
scale, such as a correlation or an area, and the difference; a number of any scale, such as a loss, and the difference
relative to the baseline's."""


@dataclass(frozen=True)
class Measure:
    """A function of stats by the name under which a run folder keeps it."""

    name: str
    of: Callable[[np.ndarray], float]
    """column means [k] to the value; or, where `whole`, the rows [n, k]"""
    whole: bool = False

    def __call__(self, stats: np.ndarray) -> float:
        """The value for rows [n, k], which may be drawn with replacement; nan without rows."""
        if len(stats) == 0:
            return float("nan")
        return float(self.of(stats if self.whole else stats.mean(axis=0)))


def _f1(mean: np.ndarray) -> float:
    true, spurious, missed = mean
    whole = 2 * true + spurious + missed
    return 2 * true / whole if whole else 0.0


def _ratio(mean: np.ndarray) -> float:
    return mean[0] / mean[1] if mean[1] else float("nan")


def _exp_ratio(mean: np.ndarray) -> float:
    with np.errstate(over="ignore"):  # a broken model has perplexity inf, which is the answer
        return float(np.exp(_ratio(mean)))


MEAN = Measure("mean", lambda mean: mean[0])
F1 = Measure("f1", _f1)
RATIO = Measure("ratio", _ratio)
EXP_RATIO = Measure("exp_ratio", _exp_ratio)
MEASURES = {measure.name: measure for measure in (MEAN, F1, RATIO, EXP_RATIO)}


@dataclass(frozen=True)
class Score:
    """One metric of one model on one split."""

    name: str
    stats: np.ndarray
    """float64 [n, k], one row per example, in data-set order"""
    of: Measure
    unit: Unit = "fraction"
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        return self.of(self.stats)

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.stats)

    def kept(self) -> dict[str, Any]:
        """As JSON; `from_kept` reads it."""
        facts = {"of": self.of.name, "unit": self.unit, "higher": self.higher_is_better}
        return {"name": self.name, "stats": self.stats.tolist(), **facts}

    @classmethod
    def from_kept(cls, kept: Mapping[str, Any], measures: Mapping[str, Measure]) -> Score:
        """measures: of the task, beside those that all tasks share. Raises MptrainError for a measure of neither."""
        name = kept["of"] if "of" in kept else kept["reduce"]  # as runs before kept it
        unit = kept.get("unit", "fraction" if kept["higher"] else "number")
        measure = {**MEASURES, **measures}.get(name)
        if measure is None:
            raise MptrainError(
                f"the score {kept['name']} of this run was computed by {name!r}, which its task no longer has: run the"
                " recipe again with --fresh."
            )
        return cls(kept["name"], np.array(kept["stats"], dtype=np.float64), measure, unit, kept["higher"])


def drop(reference: Score, score: Score) -> float:
    """How far a score is below the reference, in its direction: see Unit. nan where that is not known."""
    lost = reference.value - score.value if score.higher_is_better else score.value - reference.value
    if score.unit == "number":  # its scale has no meaning of its own
        return lost / abs(reference.value) if reference.value else math.nan
    return lost


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
