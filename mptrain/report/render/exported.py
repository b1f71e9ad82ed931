"""What `mptrain export` and `mptrain.export` made, as a table and its comparison."""

from __future__ import annotations

from rich.console import Group, RenderableType

from mptrain.recipe.exports import spec_of
from mptrain.report import words
from mptrain.report.render.export_card import compared
from mptrain.report.render.terminal import draw, line
from mptrain.report.row import Row
from mptrain.report.tables.results import Cell, Table


def exported(facts: Row) -> RenderableType:
    """facts: schema mptrain.export/v1."""
    size, full = facts["size_bytes"], facts["fp32_bytes"]
    stored = facts["runtime"].get("weight_types") or {}
    cells = [
        Cell(f"{facts['model']} as {spec_of(facts['format']).title}", facts["path"]),
        Cell(facts["precision"], (facts["compressed"] or {}).get("how", "")),
        Cell(words.megabytes(size), f"{words.megabytes(full)} in float32"),
        Cell(", ".join(f"{words.megabytes(held)} {kind}" for kind, held in stored.items()) or words.NONE),
        Cell(f"{facts['parity']['relative']:.2g}"),
        Cell(f"{100 * facts['parity']['agreement']:.1f}%"),
    ]
    columns = ["Exported", "Precision", "Size", "Weights", "Relative difference", "Same decision"]
    shown = draw(Table("", columns, [cells], text_columns=1))
    mark, tone = ("✓", "green") if facts["passed"] else ("✗", "bold red")
    verdict = f"{'within' if facts['passed'] else 'not within'} {facts['judged_by']}'s limit of {facts['limit']:g}"
    return Group(shown, *(line("•", text, "") for text in compared(facts)), line(mark, verdict, tone))
