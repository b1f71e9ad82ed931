"""Tables from files: csv, tsv, jsonl, parquet and plain text, each also as .gz or .bz2.

Cells are kept exactly as written: nothing is guessed to be a number, a date or a missing value.
A tsv has no quoting (as IANA defines it); a csv is quoted the usual way and read strictly, so a row
with too few or too many fields is an error and not a shifted row. A file without a header is
read by giving its columns as "column 1", "column 2", ….
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mptrain.core.errors import DataError
from mptrain.data.sources.places import Opener, Place, locate
from mptrain.data.sources.quoting import hidden, listed, reason, shown

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_SEPARATORS = {"\t": "tabs", ";": "semicolons (;)", "|": "bars (|)", ",": "commas"}
_POSITION = re.compile(r"column [1-9]\d*")


@dataclass
class Table:
    """Columns of equal length. `where` names the source in messages."""

    where: str
    columns: dict[str, list]
    classes: dict[str, list[str]] = field(default_factory=dict)
    """names of integer class labels, by column, where the source declares them"""
    folder: Place | None = None
    """what relative paths in cells start from"""
    separator: str = "\n\n"
    """what joins the rows to a running text"""
    rows: Sequence[int] = ()
    """the number of each row in the source, from 1 on; by default they are all there, in order"""

    secret: bytes | None = None
    """of encrypted data: keys what a run keeps of it"""

    def __post_init__(self) -> None:
        self.rows = self.rows or range(1, len(self) + 1)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, column: str) -> list:
        return self.columns[column]

    def take(self, rows: Sequence[int]) -> Table:
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, rows=[self.rows[i] for i in rows])

    def place(self, field: str, row: int) -> str:
        """The cell as messages name it: by its row in the source, where a user can correct it."""
        return f"data.{field}: row {self.rows[row]} of {self.where}"

    def choose(self, wanted: Mapping[str, str]) -> Table:
        """The columns named by `wanted` {field of `data:` -> column}, renamed to the fields. Raises DataError."""
        for option, column in wanted.items():
            if column not in self.columns:
                close = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.5)
                hint = f" Did you mean {close[0]!r}?" if close and not hidden() else ""
                raise DataError(
                    f"data.{option}: {self.where} has no column {column!r}; its columns are"
                    f" {listed(self.columns) or 'none'}.{hint} Set data.{option} to the right one."
                )
        columns = {option: self.columns[column] for option, column in wanted.items()}
        classes = {option: self.classes[column] for option, column in wanted.items() if column in self.classes}
        return replace(self, columns=columns, classes=classes)


def read_table(file: str, option: str, wanted: Iterable[str] = (), opener: Opener | None = None) -> Table:
    """Read a file named by the recipe's `option`; `wanted` are the column names that will be asked for.

    opener: of encrypted folders. Raises DataError when the file is missing, of an unknown format, malformed or without
    rows.
    """
    path = Path(file).expanduser()
    found = locate(file, option, opener)
    if found is None:
        raise DataError(
            f"{option}: there is no file {path.absolute()}. Give the path of a {', '.join(FORMATS)} file,"
            " relative to the current folder or absolute."
        )
    place, name = found
    suffixes = [s.lower() for s in Path(name).suffixes]
    packed = suffixes.pop() if suffixes[-1:] in ([".gz"], [".bz2"]) else ""
    form = suffixes[-1] if suffixes else ""
    if form not in FORMATS:
        raise DataError(f"{option}: {file} is none of the formats that can be read: {', '.join(FORMATS)}.")
    try:
        with place.open(name) as stream:
            table = _parse(stream, form, packed, f"{option} ({file})", list(wanted))
    except DataError:
        raise
    except Exception as error:  # each format has its own: zlib.error, EOFError, csv.Error, ArrowInvalid, RecursionError
        raise DataError(
            f"{option}: {path.absolute()} could not be read as {form[1:]}: {_said(error)}. Repair the file, or rename"
            " it if its ending is wrong."
        ) from (None if hidden() else error)
    if not len(table):
        raise DataError(f"{option}: {path.absolute()} holds no rows.")
    table.folder = place
    return table


class _Form(ValueError):
    """What is wrong with the form of a file, in words of ours."""


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, _Form) or not hidden() else reason(error)


def _parse(stream: BinaryIO, form: str, packed: str, where: str, wanted: Sequence[str]) -> Table:
    """packed: .gz, .bz2 or nothing."""
    if form == ".parquet":
        return _read_parquet(stream, where)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open}.get(packed)
    content: Any = stream if opener is None else opener(stream, "rb")
    with io.TextIOWrapper(content, encoding="utf-8-sig", newline="" if form == ".csv" else None) as text:
        if form == ".txt":
            return Table(where, {"text": text.read().split("\n")}, separator="\n")
        if form == ".jsonl":
            return _read_jsonl(text, where)
        return _read_separated(text, where, form, wanted)


def _read_separated(stream: TextIO, where: str, form: str, wanted: Sequence[str]) -> Table:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the default of 128 KiB
    if form == ".tsv":
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(stream, strict=True)
    headless = bool(wanted) and all(_POSITION.fullmatch(name) for name in wanted)
    _check_separator(stream.readline(), form, wanted, headless)
    stream.seek(0)
    names: list[str] | None = None
    columns: list[list[str]] = []
    for row in rows:
        if not row:
            continue
        if names is None:
            names = [f"column {i}" for i in range(1, len(row) + 1)] if headless else row
            if len(set(names)) != len(names):
                raise _Form(f"the header names a column twice: {listed(names)}")
            columns = [[] for _ in names]
            if not headless:
                continue
        if len(row) != len(names):
            raise _Form(f"line {rows.line_num} has {len(row)} fields, the first line has {len(names)}")
        for column, cell in zip(columns, row):
            column.append(cell)
    return Table(where, dict(zip(names or [], columns)))


def _check_separator(first: str, form: str, wanted: Sequence[str], headless: bool) -> None:
    """Raise _Form for a first line that other signs than a comma (tsv: a tab) cut into the columns asked for."""
    if ("\t" if form == ".tsv" else ",") in first or not wanted:
        return
    for sign, name in _SEPARATORS.items():
        cut = [cell.strip().strip('"') for cell in first.split(sign)]
        if len(cut) > 1 and (len(cut) >= len(wanted) if headless else not set(wanted).isdisjoint(cut)):
            ours = "tabs" if form == ".tsv" else "commas"
            fix = "name it .tsv" if sign == "\t" else "name it .csv" if sign == "," else f"save it with {ours}"
            raise _Form(f"its columns ({listed(cut)}) are separated by {name}, not by {ours}: {fix}")


def _read_jsonl(stream: TextIO, where: str) -> Table:
    columns: dict[str, list] = {}
    count = 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _Form(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise _Form(f"line {number} is not a JSON object")
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
        count += 1
    return Table(where, columns)


def _read_parquet(stream: BinaryIO, where: str) -> Table:
    import pyarrow.parquet as parquet

    table = parquet.read_table(stream)
    classes = {}
    if b"huggingface" in (table.schema.metadata or {}):
        from datasets import Features

        classes = class_names(Features.from_arrow_schema(table.schema))
    return Table(where, table.to_pydict(), classes)


def check_unicode(text: str, place: str) -> None:
    """Raise DataError for half of a surrogate pair: JSON can spell it, but neither tokenizers nor files take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds {shown(text[error.start])}, half of a character that was cut in two (after"
            f" {shown(text[max(0, error.start - 20) : error.start])}). Remove the half from the row, or write the row"
            " anew from a source that has the whole character."
        ) from None


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Class names by column of a `datasets` schema, also of columns that hold lists of labels."""
    found = {}
    for name, feature in features.items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            found[name] = list(names)
    return found
