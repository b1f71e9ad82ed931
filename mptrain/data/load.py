"""From the recipe's `data:` to the three splits of a task."""

from __future__ import annotations

import importlib
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mptrain.core.errors import DataError, MptrainError, out_of_memory
from mptrain.data.sources import splits
from mptrain.data.sources.quoting import hidden
from mptrain.data.sources.read import Source, read_source
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import GROUP, IDENTITY, Examples, Task
from mptrain.recipe import TASKS, Data, TaskSpec, tasks

__all__ = ["Examples", "Task", "load_data", "task_class"]

log = logging.getLogger(__name__)


def task_class(kind: TaskSpec) -> type[Task]:
    """The class of a row of TASKS. Raises DataError for a home that is not there."""
    module, _, name = kind.home.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"task {kind.name}: {kind.home} cannot be imported ({error}); give module:Class.") from error
    return found


def load_data(spec: Data, task: str, processor: Any, *, seed: int, allow_code: bool = False) -> Task:
    """Read, split and encode the data of a task.

    Args:
        processor: what `load_processor` returned for the model.
        seed: draws the calibration examples. It does not touch the splits.
        allow_code: let the recipe run code: a command that prints the key of encrypted data.

    Returns the Task, whose `facts` hold: source, rows by split, how the splits came about, rows of
    validation and test whose input also occurs in train ("overlap_with_train"), groups by split and
    groups that cross splits, label counts, examples and how many were cut, and for packaged data what
    was dropped. Raises DataError.
    """
    kind = task_class(TASKS[task])
    columns = _columns(spec, kind.kind)
    wanted = [*columns.values(), *([spec.split.group] if spec.split.group else [])]
    inputs = [columns[field] for field in kind.inputs() if field in columns]
    source = read_source(spec, wanted, inputs, allow_code=allow_code)
    with _unquoted():
        return _load(spec, kind, source, columns, processor, seed)


@contextmanager
def _unquoted() -> Iterator[None]:
    """What libraries say of encrypted data that they cannot take may quote it, and so may a traceback."""
    try:
        yield
    except MptrainError:
        raise
    except Exception as error:
        if not hidden() or out_of_memory(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"data: {type(error).__name__} in {last.name} ({Path(last.filename).name}, line {last.lineno}); what it"
            " says is not shown, for the data is encrypted. Decrypt a copy with `mptrain data decrypt` to look at it."
        ) from None


def _load(spec: Data, kind: type[Task], source: Source, columns: dict[str, str], processor: Any, seed: int) -> Task:
    columns = kind.fields(columns, spec, list(source.tables["train"].columns))
    group = spec.split.group or source.group
    if group is None and (own := kind.group(source.tables["train"].choose(columns))) is not None:
        group = columns[own]
    given = {
        name: table.choose({**columns, **({GROUP: group} if group else {})}) for name, table in source.tables.items()
    }
    for table in given.values():
        table.columns[IDENTITY] = kind.identity(table)
        table.secret = source.secret
    in_order = kind.in_order and not group
    train = given["train"]
    keys = (
        [str(row) for row in range(len(train))] if in_order else [str(k) for k in train[GROUP if group else IDENTITY]]
    )
    tables = splits.complete(given, keys, spec.split, in_order=in_order)
    facts = {
        **source.facts,
        "rows": {name: len(table) for name, table in tables.items()},
        "cut_from_train": {n: getattr(spec.split, n) for n in splits.SPLITS if n not in given},
        "max_samples": spec.max_samples,
        **_grouping(tables, group),
    }
    if not kind.in_order:  # in running text, short rows such as headings recur without meaning anything
        facts["overlap_with_train"] = _overlap(tables)
    task = kind(tables, spec, processor, seed, facts)
    if spec.unlabelled is not None:
        task.add_unlabelled(_unlabelled(source.unlabelled, kind, columns))
    return task


def _unlabelled(table: Table | None, kind: type[Task], columns: dict[str, str]) -> Table:
    assert table is not None  # `read_source` read it
    found = table.choose({field: columns[field] for field in kind.inputs() if field in columns})
    found.columns[IDENTITY] = kind.identity(found)
    return found


def _columns(spec: Data, kind: TaskSpec) -> dict[str, str]:
    """The column of each field that the task reads. Raises DataError for an option that it does not."""
    for field in sorted(spec.columns):
        if field not in kind.columns:
            raise DataError(
                f"data.{field}: the task {kind.name} does not use it; drop it. It reads"
                f" {', '.join('data.' + name for name in kind.columns)}."
            )
    for option in sorted(tasks.options()):
        if getattr(spec, option) is not None and option not in kind.options:
            raise DataError(f"data.{option}: the task {kind.name} does not use it; drop it.")
    chosen = {field: spec.columns.get(field) or column.default for field, column in kind.columns.items()}
    return {field: column for field, column in chosen.items() if column is not None}


def _grouping(tables: Mapping[str, Table], group: str | None) -> dict[str, Any]:
    if group is None:
        return {}
    sets = {name: {str(key) for key in table[GROUP]} for name, table in tables.items()}
    crossing = sum(map(len, sets.values())) - len(set().union(*sets.values()))
    if crossing:
        log.warning("data: %d groups of %s occur in more than one split, so test is not independent", crossing, group)
    return {"groups": {"column": group, **{name: len(keys) for name, keys in sets.items()}, "crossing": crossing}}


def _overlap(tables: Mapping[str, Table]) -> dict[str, int]:
    found = splits.overlap({name: table[IDENTITY] for name, table in tables.items()})
    for name, count in found.items():
        if count:
            total = len(tables[name])
            log.warning(
                "data: %d of %d %s rows also occur in train: their score flatters the model", count, total, name
            )
    return found
