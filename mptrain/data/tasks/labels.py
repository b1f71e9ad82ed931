"""Class labels as names and indices.

Names come from the training split: the declared names of a `datasets` ClassLabel in their order, else
the distinct labels, whole numbers by value (then as written) and everything else alphabetically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mptrain.core.errors import DataError
from mptrain.data.sources.tables import check_unicode


def label_names(values: Sequence[Any], rows: Sequence[int], declared: Sequence[str] | None, where: str) -> list[str]:
    """The class names in index order; `rows` are the numbers of the values' rows in the source.

    Raises DataError for missing, fractional or fewer than two labels.
    """
    if declared is not None:
        names = list(declared)
    else:
        distinct = {_name(value, where, row) for value, row in zip(values, rows, strict=True)}
        whole = all(name.removeprefix("-").isdecimal() for name in distinct)
        # 1 and 01 are two labels of one value: their order must not be that of a set.
        names = sorted(distinct, key=lambda name: (int(name), name)) if whole else sorted(distinct)
        if len(values) >= 20 and len(names) > len(values) / 2:
            raise DataError(
                f"{where}: {len(names)} different labels in {len(values)} rows ({_shown(names, 3)}): this is not a"
                " column of class labels. Set the option to the right column."
            )
    if len(names) < 2:
        raise DataError(f"{where}: a classifier needs at least two labels, the training split has {names}.")
    return names


def label_indices(
    values: Sequence[Any], rows: Sequence[int], names: Sequence[str], declared: Sequence[str] | None, where: str
) -> list[int]:
    """The index in `names` of every label. Raises DataError naming a label that is not among them and its row."""
    index = {name: i for i, name in enumerate(names)}
    indices = []
    for value, row in zip(values, rows, strict=True):
        name = _declared_name(value, declared) if declared is not None else _name(value, where, row)
        if name not in index:
            raise DataError(
                f"{where}: row {row} has the label {value!r}, which the training split does not have; its labels"
                f" are {_shown(names)}. Correct or drop such rows; a split whose labels are hidden (-1)"
                " cannot be scored, so use another."
            )
        indices.append(index[name])
    return indices


def _declared_name(value: Any, declared: Sequence[str]) -> str | None:
    if isinstance(value, str):
        return value
    return declared[value] if value is not None and 0 <= value < len(declared) else None


def _name(value: Any, where: str, row: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # parquet and pandas make floats of whole numbers beside a missing one
    if isinstance(value, str | int) and value != "":
        check_unicode(str(value), f"{where}: row {row}")
        return str(value)
    raise DataError(
        f"{where}: row {row} has {value!r} where a class label (text or a whole number) is needed. Correct the row,"
        " or set the column with the labels."
    )


def _shown(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
