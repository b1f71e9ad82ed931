"""A comparison of runs as pages: comparison.json, comparison.md and comparison.html, drawn from its facts alone."""

from __future__ import annotations

from pathlib import Path

from mptrain.core.disk import write_json
from mptrain.report.render.html import figures, fill
from mptrain.report.render.markdown import escape, section
from mptrain.report.render.page import INTERVALS, NO_PLOTS
from mptrain.report.row import Row
from mptrain.report.tables import compare as tables

FILE = "comparison.json"


def write(found: Row, folder: Path) -> Path:
    """Write the three files into `folder`, which is made if needed; returns the page. Raises OSError."""
    write_json(folder / FILE, found)
    for name, text in (("comparison.md", markdown(found)), ("comparison.html", page(found))):
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "comparison.html"


def markdown(found: Row) -> str:
    parts = [f"# {escape(_title(found))}", escape(_lead(found))]
    parts += [f"> **Note:** {escape(text)}" for text in found["notes"]]
    parts += [section(table) for table in (tables.results(found), tables.differs(found)) if table]
    return "\n\n".join(parts) + "\n"


def page(found: Row) -> str:
    return fill(
        "compare.html.j2",
        title=_title(found),
        lead=_lead(found),
        notes=found["notes"],
        results=tables.results(found),
        differs=tables.differs(found),
        plots=figures("compared", found),
        no_plots=NO_PLOTS,
        intervals=INTERVALS,
    )


def _title(found: Row) -> str:
    return f"Comparison of {', '.join(run['name'] for run in found['runs'])}"


def _lead(found: Row) -> str:
    cpus = ", ".join(dict.fromkeys(run["cpu"] or "unknown CPU" for run in found["runs"]))
    return f"{found['task'].replace('-', ' ').capitalize()}, {len(found['rows'])} variants, on {cpus}."
