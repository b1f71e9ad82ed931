"""What a terminal is shown, as HTML for a notebook: the same tables and lines, every string escaped."""

from __future__ import annotations

from html import escape

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_STYLES = {
    "bold": "font-weight:600",
    "green": "color:#1a7f37",
    "yellow": "color:#9a6700",
    "red": "color:#cf222e",
    "dim": "opacity:.65",
}


def html(shown: RenderableType) -> str:
    """Of groups, tables, lines and texts, as `mptrain.report.render` makes them."""
    if isinstance(shown, Group):
        return "".join(map(html, shown.renderables))
    if isinstance(shown, Padding):
        return html(shown.renderable)
    if isinstance(shown, Table):
        return _table(shown) if shown.show_header and shown.columns[0].header else _line(shown)
    if isinstance(shown, Text):
        return f"<pre>{escape(shown.plain)}</pre>"
    raise TypeError(f"no HTML is written for {type(shown).__name__}")


def text(shown: RenderableType, width: int = 120) -> str:
    """As a terminal without colours of that width shows it."""
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _table(table: Table) -> str:
    """With its title as caption; numbers to the right as in the terminal."""
    sides = [f' style="text-align:{column.justify}"' for column in table.columns]
    head = "".join(f"<th{side}>{_inline(column.header)}</th>" for side, column in zip(sides, table.columns))
    rows = (
        "".join(f"<td{side}>{_inline(cell)}</td>" for side, cell in zip(sides, cells))
        for cells in zip(*(list(column.cells) for column in table.columns))
    )
    title = f"<caption>{_inline(table.title)}</caption>" if table.title else ""
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line(grid: Table) -> str:
    cells = (cell for column in grid.columns for cell in column.cells)
    return f"<div>{' '.join(map(_inline, cells))}</div>"


def _inline(cell: RenderableType | None) -> str:
    if not isinstance(cell, Text):
        return escape(str(cell or ""))
    words = str(cell.style).split()
    style = ";".join(_STYLES[word] for word in words if word in _STYLES)
    said = escape(cell.plain).replace("\n", "<br>")
    return f'<span style="{style}">{said}</span>' if style else said
