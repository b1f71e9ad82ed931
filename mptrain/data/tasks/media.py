"""The encoded file in a table cell: a path, bytes, {"bytes", "path"} or a row of a `datasets` table."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mptrain.core.errors import DataError
from mptrain.data.sources.places import NoFile, OnDisk
from mptrain.data.sources.quoting import hidden, shown
from mptrain.data.sources.read import Stored
from mptrain.data.sources.tables import Table, check_unicode


def read_bytes(table: Table, field: str, row: int) -> bytes:
    """The encoded file in a cell. Raises DataError naming the row and the absolute path that was tried."""
    value = cell(table, field, row)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{table.place(field, row)} holds {_short(value)} where the path of a file is needed; correct the row or"
            f" set data.{field}."
        )
    check_unicode(value, table.place(field, row))
    place = table.folder or OnDisk(Path())
    try:
        return place.read(value)
    except NoFile:
        raise DataError(f"{table.place(field, row)} names {shown(value)}, which is no file; correct the row.") from None
    except (OSError, ValueError, RuntimeError) as error:  # also NUL in a name, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{table.place(field, row)} names {_short(value)}, but {place.shown(value)} could not be read ({reason})."
            " Paths are relative to the folder of the data file."
        ) from (None if hidden() else error)


def cell(table: Table, field: str, row: int) -> Any:
    """What a cell holds; a row of a `datasets` table is read now."""
    value = table[field][row]
    return value.read() if isinstance(value, Stored) else value


def digest(*parts: bytes) -> str:
    """sha256 of the parts one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 or hidden() else text[:57] + "..."
