"""Class labels as names and indices.

The names are those of `data.labels`; without it those of the training split: the declared names of a `datasets`
ClassLabel in their order, else the distinct labels, whole numbers by value (then as written) and everything else
alphabetically. A class that only validation or test has gets an index behind all others: no model has an output for
it, so its rows count as errors, and that is said.

What people write without meaning it is named: one class in several spellings ("DESC", "DESC ", "desc"), and several
classes in one cell ("A|B"), which this makes a class of its own.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import hidden, listed, shown
from mptrain.data.sources.tables import check_unicode

log = logging.getLogger(__name__)

_JOINED = "|;,/+&"
"""what joins several classes in one cell"""


@dataclass(frozen=True)
class Column:
    """The labels of one split. rows: the numbers of their rows in the source; declared: names of whole numbers."""

    values: Sequence[Any]
    rows: Sequence[int]
    declared: Sequence[str] | None
    where: str
    """data.label (FILE), for messages"""


@dataclass(frozen=True)
class Classes:
    """names: of the outputs of a head, by index. unseen: names of further classes, whose indices follow.

    indices: of the labels of every split. counts: {split: {name: how often}}.
    """

    names: list[str]
    unseen: list[str]
    indices: dict[str, list[int]]
    counts: dict[str, dict[str, int]]


def classes_of(columns: Mapping[str, Column], given: Sequence[str | int] | None, field: str) -> Classes:
    """The classes of the splits "train", "validation" and "test". given: `data.labels`; field: the one of the column.

    Raises DataError for missing, fractional or hidden labels, fewer than two classes, a class that data.labels does
    not name, and a split of which most rows have classes that training does not have.
    """
    words: dict[str, list[str]] = {}
    for split, column in columns.items():
        words[split] = [_name(value, row, column) for value, row in zip(column.values, column.rows, strict=True)]
    names = _given(given) if given is not None else _of_train(columns["train"], words["train"])
    index = {name: i for i, name in enumerate(names)}
    for split, column in columns.items():
        if split == "train" or given is not None:
            _check_named(words[split], column, names, "data.labels" if given is not None else "its source")
    counts = {split: Counter(found) for split, found in words.items()}
    unseen = sorted({word for found in counts.values() for word in found if word not in index})
    for split, column in columns.items():
        _say_unseen(split, column, words[split], index, field)
    index |= {name: len(names) + i for i, name in enumerate(unseen)}
    total = sum(counts.values(), Counter())
    for line in _doubtful(total, field):
        log.warning("%s", line)
    ordered = {split: {name: found[name] for name in index if found[name]} for split, found in counts.items()}
    return Classes(names, unseen, {split: [index[word] for word in found] for split, found in words.items()}, ordered)


def class_lines(counts: Mapping[str, Mapping[str, int]], most: int = 25) -> list[str]:
    """A table, as lines, of how often each class occurs in each split; of many classes the commonest."""
    total = sum((Counter(found) for found in counts.values()), Counter())
    chosen = [name for name, _ in total.most_common(most)] if len(total) > most else list(total)
    width = max(len("class"), *(len(repr(name)) for name in chosen))
    lines = [f"{'class':<{width}}" + "".join(f"{split:>12}" for split in counts)]
    for name in chosen:
        lines.append(f"{name!r:<{width}}" + "".join(f"{found.get(name, 0):>12,}" for found in counts.values()))
    if len(total) > most:
        rest = sum(total.values()) - sum(total[name] for name in chosen)
        lines.append(f"and {len(total) - most} classes more, {rest:,} in all")
    return lines


def _given(labels: Sequence[str | int]) -> list[str]:
    names = [str(label) for label in labels]
    if len(set(names)) != len(names):
        raise DataError(f"data.labels: {next(n for n in names if names.count(n) > 1)!r} is there twice; drop one.")
    if len(names) < 2:
        raise DataError(f"data.labels: a classifier needs at least two classes, got {names}.")
    return names


def _of_train(column: Column, words: Sequence[str]) -> list[str]:
    if column.declared is not None:
        names = list(column.declared)
    else:
        distinct = set(words)
        whole = all(name.removeprefix("-").isdecimal() for name in distinct)
        # 1 and 01 are two labels of one value: their order must not be that of a set.
        names = sorted(distinct, key=lambda name: (int(name), name)) if whole else sorted(distinct)
        if len(words) >= 20 and len(names) > len(words) / 2:
            raise DataError(
                f"{column.where}: {len(names)} different labels in {len(words)} rows ({_shown(names, 3)}): this is not"
                " a column of class labels. Set the option to the right column."
            )
    if len(names) < 2:
        raise DataError(
            f"{column.where}: a classifier needs at least two labels, the training split has {shown(names)}. Name them"
            " all in data.labels if others may come."
        )
    return names


def _check_named(words: Sequence[str], column: Column, names: Sequence[str], by: str) -> None:
    known = set(names)
    for word, row in zip(words, column.rows):
        if word not in known:
            raise DataError(
                f"{column.where}: row {row} has the label {shown(word)}, which {by} does not name; it names"
                f" {_shown(names)}. Correct the row{', or add the class there' if by == 'data.labels' else ''}."
            )


def _say_unseen(split: str, column: Column, words: Sequence[str], index: Mapping[str, int], field: str) -> None:
    at = [row for word, row in zip(words, column.rows) if word not in index]
    if not at:
        return
    rows, counts = len(at), Counter(word for word in words if word not in index)
    found = _shown([f"{shown(name)}: {count}" for name, count in counts.most_common()]) + f"; first in row {at[0]}"
    if 2 * rows > len(column.values):
        raise DataError(
            f"{column.where}: {rows} of {len(column.values)} labels of {split} are classes that the training split does"
            f" not have ({found}). Write them as there, or name all classes in data.labels."
        )
    log.warning(
        "%s: %d of %d labels of %s are classes that the training split does not have (%s). No model can predict them:"
        " they count as errors, unless data.labels names them.",
        field, rows, len(column.values), split, found,
    )  # fmt: skip


def _doubtful(counts: Mapping[str, int], field: str) -> list[str]:
    """What looks like one class written in several ways, or like several classes in one cell."""
    lines = []
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            found = ", ".join(f"{shown(name)}: {counts[name]}" for name in group)
            lines.append(f"{field}: {len(group)} classes differ in case or spaces only ({found}). Write them alike.")
    for joint in _JOINED:
        parts = {name: [part.strip() for part in name.split(joint)] for name in counts if joint in name}
        # Of a sign that also stands in names (and/or) only where its parts are classes by themselves.
        joined = [name for name, found in parts.items() if len(found) > 1 and all(p in counts for p in found)]
        if joint in "|;":
            again = Counter(part for found in parts.values() for part in found)
            joined = [n for n, found in parts.items() if all(found) and any(p in counts or again[p] > 1 for p in found)]
        if joined:
            rows = sum(counts[name] for name in joined)
            lines.append(
                f"{field}: {len(joined)} of {len(counts)} classes look like several in one cell, joined by {joint!r}"
                f" ({_shown([shown(name) for name in joined], 3)}; {rows} rows). Each combination is a class of its own"
                " here: a row has one class."
            )
    return lines


def _name(value: Any, row: int, column: Column) -> str:
    """A label as text."""
    if column.declared is not None:
        if isinstance(value, str):
            return value
        if value is None or not 0 <= value < len(column.declared):
            raise DataError(
                f"{column.where}: row {row} has the label {shown(value)}, which is none of {_shown(column.declared)}."
                " Correct or drop such rows; a split whose labels are hidden (-1) cannot be scored, so use another."
            )
        return column.declared[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # parquet and pandas make floats of whole numbers beside a missing one
    if isinstance(value, str | int) and value != "":
        check_unicode(str(value), f"{column.where}: row {row}")
        return str(value)
    raise DataError(
        f"{column.where}: row {row} has {shown(value)} where a class label (text or a whole number) is needed. Correct"
        " the row, or set the column with the labels."
    )


def _shown(names: Sequence[str], most: int = 12) -> str:
    if hidden():
        return listed(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
