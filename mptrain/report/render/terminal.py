"""The report in a terminal: the end of a run, and `mptrain report RUN`."""

from __future__ import annotations

from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from mptrain.report import claims
from mptrain.report.tables import choices, compare, results
from mptrain.report.tables.results import Cell, Table

_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "quiet": "dim", "plain": "", "": ""}
_MARKS = {"good": "✓", "warn": "!", "bad": "✗", "plain": "•"}


def summary(report: dict[str, Any]) -> RenderableType:
    """Results, gates and verdict for `rich.print`; strings are literal, escape codes removed."""
    parts: list[RenderableType] = []
    for table in (results.results(report), choices.table(report), results.gates(report)):
        if table:
            parts.append(draw(table, without=("Parameters",)))
    for claim in claims.claims(report):
        parts.append(line(_MARKS[claim.tone], claim.text, _STYLES[claim.tone]))
    advice = report["recommendation"]
    if advice:
        parts.append(line("→", advice["reason"], "bold"))
        parts += [line("!", text, "yellow") for text in advice["warnings"]]
    parts += [line("!", text, "yellow") for text in report["notes"]]
    return Group(*parts)


def comparison(found: dict[str, Any]) -> RenderableType:
    """What `report.compare` found, in two tables."""
    parts: list[RenderableType] = [draw(compare.results(found))]
    if table := compare.differs(found):
        parts.append(draw(table))
    parts += [line("!", text, "yellow") for text in found["notes"]]
    return Group(*parts)


def draw(table: Table, without: tuple[str, ...] = ()) -> RichTable:
    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [i for i, name in enumerate(table.columns) if name not in without]
    for i in shown:
        justify: Literal["left", "right"] = "left" if i <= table.text_columns else "right"
        drawn.add_column(Text(_clean(table.columns[i])), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(_cell(row[i]) for i in shown))
    # The longest word of the first column is a variant's name: keep it whole where there is room.
    words = [word for row in table.rows for word in row[0].text.split()]
    drawn.columns[0].min_width = min(20, max(map(len, words), default=0))
    return drawn


def _cell(cell: Cell) -> Text:
    text = Text(_clean(cell.text), style=_STYLES[cell.tone])
    if cell.sub:
        text.append(f"\n{_clean(cell.sub)}", style="dim")
    return text


def line(mark: str, text: str, style: str) -> RenderableType:
    grid = RichTable.grid(padding=(0, 1))
    grid.add_row(Text(mark, style=style), Text(_clean(text)))
    return Padding(grid, (0, 0, 0, 1))


def _clean(text: str) -> str:
    """Without control characters: a label must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
