"""Cutting the splits that a data set lacks, and checking those it has.

Which side a row falls on is decided by sha256 of its key alone (the group if one is given, else the
input itself), never by a random generator or by the run's seed: every run, on any machine and with any
seed, scores the same test rows, and a teacher trained by another run has not seen them.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence

from mptrain.core.errors import DataError
from mptrain.data.sources.tables import Table
from mptrain.recipe import Split

SPLITS = ("train", "validation", "test")


def cut(keys: Sequence[str], fractions: Mapping[str, float], *, in_order: bool = False) -> dict[str, list[int]]:
    """Row indices of "train" and of every split in `fractions`, in the order of the rows.

    Rows with equal keys stay together. Test, then validation take whole keys in the order of sha256(key)
    until they hold at least their fraction of the rows; the rest is train. in_order: in the order of
    the rows instead, from the end, for running text.
    """
    members: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    order = deque(reversed(members) if in_order else sorted(members, key=_digest))
    parts: dict[str, list[int]] = {"train": []}
    for name in sorted(fractions, key=SPLITS.index, reverse=True):
        parts[name] = []
        while order and len(parts[name]) < math.ceil(fractions[name] * len(keys)):
            parts[name] += members[order.popleft()]
    parts["train"] = [row for key in order for row in members[key]]
    return {name: sorted(rows) for name, rows in parts.items()}


def complete(
    tables: Mapping[str, Table], keys: Sequence[str], split: Split, *, in_order: bool = False
) -> dict[str, Table]:
    """The splits train, validation and test; the missing ones are cut from train, whose row keys are `keys`."""
    fractions = {name: getattr(split, name) for name in ("validation", "test") if name not in tables}
    if not fractions:
        return {name: tables[name] for name in SPLITS}
    if sum(fractions.values()) >= 1:
        raise DataError(f"data.split: validation and test ({fractions}) leave nothing to train on; lower them.")
    train = tables["train"]
    parts = {name: train.take(rows) for name, rows in cut(keys, fractions, in_order=in_order).items()}
    whole = {**tables, **parts}
    empty = [name for name in SPLITS if not len(whole[name])]
    if empty:
        raise DataError(
            f"data.split: {train.where} has {len(train)} rows in {len(set(keys))} groups, too few to cut"
            f" {' and '.join(fractions)} from: {' and '.join(empty)} would be empty. Give more data, or the splits as"
            f" files in {' and '.join('data.' + name for name in fractions)}."
        )
    return {name: whole[name] for name in SPLITS}


def overlap(identities: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many rows of validation and test have an input that also occurs in train, exactly."""
    seen = set(identities["train"])
    return {name: sum(key in seen for key in identities[name]) for name in ("validation", "test")}


def sample(rows: int, count: int | None) -> list[int]:
    """`count` of `rows` row numbers in ascending order, spread over the whole; all of them for None."""
    if count is None or count >= rows:
        return list(range(rows))
    # The files are often sorted by label, so the first `count` rows would not do.
    return sorted(sorted(range(rows), key=lambda row: _digest(str(row)))[:count])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
