"""report.md: the report as Markdown whose tables also read well in a terminal.

Strings from models, data and recipes are inline text here, never markup: `escape` sees to it.
"""

from __future__ import annotations

import re

from mptrain.report import claims
from mptrain.report.row import Row
from mptrain.report.tables import choices, generation, models, results
from mptrain.report.tables.results import Cell, Table

_MARKS = {"good": "✓", "warn": "!", "bad": "✗", "plain": "•"}


def escape(text: str) -> str:
    """Inline text that Markdown (CommonMark and GitHub's tables, links and maths) shows literally.

    One line: whitespace of all kinds becomes a space, control characters vanish. An underscore
    between letters or digits is literal anyway and stays readable.
    """
    text = re.sub(r"\s+", " ", text)
    text = "".join(c for c in text if c.isprintable())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#])", r"\\\1", text)
    text = re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)
    # GitHub makes links of bare addresses and mentions.
    text = text.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"(?i)\bwww\.", "www&#46;", text)


def markdown(report: Row) -> str:
    recipe = report["recipe"]
    parts = [f"# {escape(report['name'])}"]
    if recipe["description"]:
        parts.append(escape(recipe["description"]))
    made = f"{report['task']} with {recipe['model']['path']}, {report['created'][:10]}, {report['host'].get('cpu', '')}"
    parts.append(escape(made))
    verdict = [f"- {_MARKS[c.tone]} {escape(c.text)}" for c in claims.claims(report)]
    if verdict:
        parts.append("## Verdict\n\n" + "\n".join(verdict))
    advice = report["recommendation"]
    if advice:
        parts.append(f"**On this host use {escape(advice['id'])}.** {escape(advice['reason'])}")
    parts += [f"> **Note:** {escape(text)}" for text in [*(advice or {}).get("warnings", []), *report["notes"]]]
    every = (
        results.results(report),
        choices.table(report),
        results.latency(report),
        generation.table(report),
        results.throughput(report),
        results.gates(report),
        models.structure(report),
        models.compressed(report),
        models.restored(report),
        results.training(report),
        models.runtime(report),
        models.half(report),
    )
    parts += [section(table) for table in every if table]
    lists = models.layer_lists(report)
    if lists:
        lines = [f"- {escape(title)}: {escape(', '.join(names))}" for title, names in lists]
        parts.append("### Layers by precision\n\n" + "\n".join(lines))
    closing = (results.data(report), results.time(report), results.environment(report))
    parts += [section(table) for table in closing if table]
    return "\n\n".join(parts) + "\n"


def section(table: Table) -> str:
    note = f"\n\n{escape(table.note)}" if table.note else ""
    return f"## {escape(table.title)}\n\n{grid(table)}{note}"


def grid(table: Table) -> str:
    """The table in Markdown, padded so that its columns stand below each other."""
    lines = [[escape(name) for name in table.columns], *([_cell(c) for c in row] for row in table.rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(table.columns))]
    numbers = [i > table.text_columns for i in range(len(table.columns))]

    def row(cells: list[str]) -> str:
        padded = [c.rjust(w) if number else c.ljust(w) for c, w, number in zip(cells, widths, numbers, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if number else "-" * w for w, number in zip(widths, numbers, strict=True)]
    return "\n".join([row(lines[0]), row(rule), *(row(line) for line in lines[1:])])


def _cell(cell: Cell) -> str:
    text = f"**{escape(cell.text)}**" if cell.best else escape(cell.text)
    return f"{text} ({escape(cell.sub)})" if cell.sub else text
