"""How far two models decide alike: one number in 0..1 to each decision, 1 for the same.

same        1 where both choose the same class, else 0
order       share of the other examples that both put on the same side of this one
closeness   1 − |difference| / spread, not below 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mptrain.core.signature import MASK, Outputs


def array(value: Any) -> np.ndarray:
    """Of a tensor, or an array as it is."""
    return value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def decisions(expected: Outputs, got: Outputs, mask: Mapping[str, Any] | None = None) -> np.ndarray:
    """Over all outputs that both have: the class chosen, of outputs [b, 1] or [b], which choose none, the order.

    mask: the batch, for outputs with a row to each token; only tokens that its attention mask counts decide.
    """
    found = []
    for name in expected:
        if name not in got:
            continue
        a, b = array(expected[name]), array(got[name])
        kept = None if mask is None or MASK not in mask else array(mask[MASK]).astype(bool)
        if kept is not None and a.ndim == 2:  # a score to each token: the token is what is chosen
            a, b, kept = np.where(kept, a, -np.inf), np.where(kept, b, -np.inf), None
        if a.ndim < 2 or a.shape[-1] == 1:
            a, b = (a, b) if kept is None else (a[kept], b[kept])
            found.append(order(a.reshape(-1), b.reshape(-1)))
        else:  # padding is left out of the choices, not of the logits, which are large
            alike = same(a, b)
            found.append(alike if kept is None else alike.reshape(a.shape[:-1])[kept].reshape(-1))
    return np.concatenate(found) if found else np.zeros(0)


def same(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Arrays [..., classes] to one number for each row."""
    return (expected.argmax(-1) == got.argmax(-1)).astype(np.float64).reshape(-1)


def order(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Scores [n] to [n]. Pairs that `expected` ties do not count; where there are no others, closeness decides."""
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    theirs = np.sign(expected[:, None] - expected[None])
    counted = theirs != 0
    alike = (np.sign(got[:, None] - got[None]) == theirs) & counted
    pairs = counted.sum(1)
    return np.where(pairs > 0, alike.sum(1) / np.maximum(pairs, 1), closeness(expected, got))


def closeness(expected: np.ndarray, got: np.ndarray, spread: float | None = None) -> np.ndarray:
    """Numbers [n] to [n]. spread: default the standard deviation of `expected`, else the size of its values."""
    if spread is None or not spread > 0:
        spread = float(expected.std()) or float(np.abs(expected).max(initial=0.0)) or 1.0
    return 1.0 - np.minimum(1.0, np.abs(expected - got) / spread)
