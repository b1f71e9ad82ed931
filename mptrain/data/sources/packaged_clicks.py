"""packaged:clicks: 12,000 offers to 3,000 made-up users, clicked or not, drawn by a fixed seed.

    item        what is offered, one of 32: i00 … i31, four of each of eight kinds
    history     what the user looked at before, the oldest first: "i07 i31 …", 2 to 40 items
    click       1 or 0
    chance      the probability by which click was drawn
    user        a user has four offers; splits keep them together

Interests drift: a user looks at items of one kind, and now and then turns to another. A click is for the kind that was
looked at lately, however often others were before. With c the kinds, n the length, b_i of the item

    chance = sigmoid(b_i − 2 + 5 Σ_t v_t [c(h_t) = c(item)] / Σ_t v_t),   v_t = 2^((t − n) / 3)

No score orders a click before none more often than the chance itself does, in BAYES_AUC of the pairs in expectation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

VERSION = 1
SOURCE = None
GROUP = "user"
FILE = "clicks.parquet"
ITEMS, KINDS = 32, 8
USERS, OFFERS, SHORTEST, LONGEST = 3000, 4, 2, 40
BAYES_AUC = 0.8746
_TURNS = 0.12
"""chance that a user turns to another kind at a step"""
_STRAYS = 0.15
"""share of a history that is of any kind"""


def make(source: Path | None, folder: Path) -> None:
    """Write clicks.parquet into `folder`."""
    names = ("item", "history", "click", "chance", GROUP)
    columns = dict(zip(names, map(list, zip(*rows()))))
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / FILE)


def rows() -> Iterator[tuple[str, str, int, float, str]]:
    """(item, history, click, chance, user) of each row."""
    draw = np.random.default_rng(0)
    liked = draw.normal(0, 0.5, ITEMS)
    for user in range(USERS):
        length = int(draw.integers(SHORTEST, LONGEST + 1))
        history = _history(draw, length)
        for _ in range(OFFERS):
            item = _offered(draw, history)
            chance = chance_of(history, item, liked)
            yield name(item), " ".join(map(name, history)), int(draw.random() < chance), chance, f"user-{user:04}"


def name(item: int) -> str:
    return f"i{item:02}"


def kind(item: np.ndarray | int) -> np.ndarray | int:
    return item % KINDS


def chance_of(history: np.ndarray, item: int, liked: np.ndarray) -> float:
    """history: int [n]. liked: [items]."""
    lately = 2.0 ** (np.arange(1 - len(history), 1) / 3)
    share = float(lately @ (kind(history) == kind(item)) / lately.sum())
    return float(1 / (1 + np.exp(-(liked[item] - 2 + 5 * share))))


def bayes_auc(chances: np.ndarray) -> float:
    """The share of pairs of a click and none that the chances [n] order, in expectation over the clicks; of two equal
    chances a half."""
    values, place = np.unique(np.asarray(chances, np.float64), return_inverse=True)
    count = np.bincount(place)
    clicks, none = count * values, count * (1 - values)  # expected, of each chance
    itself = float(clicks @ (1 - values))  # pairs of a row with itself, which are none
    ordered = clicks @ (np.cumsum(none) - none) + (clicks @ none - itself) / 2
    return float(ordered / (clicks.sum() * none.sum() - itself))


def _history(draw: np.random.Generator, length: int) -> np.ndarray:
    current, found = int(draw.integers(KINDS)), []
    for _ in range(length):
        if draw.random() < _TURNS:
            current = int(draw.integers(KINDS))
        looked_at = int(draw.integers(KINDS)) if draw.random() < _STRAYS else current
        found.append(looked_at + KINDS * int(draw.integers(ITEMS // KINDS)))
    return np.array(found)


def _offered(draw: np.random.Generator, history: np.ndarray) -> int:
    """Of the last kind, of one from before, or of any."""
    which = draw.random()
    if which < 0.35:
        near = int(kind(int(history[-1])))
    elif which < 0.75:
        near = int(kind(int(history[draw.integers(len(history))])))
    else:
        near = int(draw.integers(KINDS))
    return near + KINDS * int(draw.integers(ITEMS // KINDS))
