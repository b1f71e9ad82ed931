"""Drawings of pages as inline SVG. Needs matplotlib (the `plots` extra).

Colours are written as CSS variables of the page (`var(--ink)`, `var(--c1)`…), so one
drawing serves light, dark and print. Text stays text. Names from models and data are drawn
literally: mathtext is off, and XML is escaped by matplotlib.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mptrain.report.row import Row

# Placeholders that no drawing uses otherwise, by the CSS variable that replaces them.
_COLOURS = {
    "#01f0a0": "ink",
    "#01f0a1": "muted",
    "#01f0a2": "line",
    "#01f0b1": "c1",
    "#01f0b2": "c2",
    "#01f0b3": "c3",
    "#01f0b4": "c4",
    "#01f0b5": "c5",
    "#01f0b6": "c6",
}
INK, MUTED, LINE, *SERIES = _COLOURS
MARKERS = "oDs^vP"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mptrain",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Plot:
    """`svg` is safe to put into a page as it is; `text` says in words what it shows."""

    key: str
    title: str
    text: str
    svg: str


def drawn(drawings: Sequence[tuple[str, str, str, Callable[[Row], Figure | None]]], facts: Row) -> list[Plot]:
    """Those of (key, title, text, function of the facts) that there are data for."""
    found = []
    for key, title, text, draw in drawings:
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()  # a user's own style has no say here
            # The page has the reader's fonts, which know more letters than matplotlib's.
            warnings.filterwarnings("ignore", r"Glyph .* missing from font")
            matplotlib.rcParams.update(_STYLE)
            figure = draw(facts)
            if figure is not None:
                found.append(Plot(key, title, text, _svg(figure, key, f"{title}. {text}")))
    return found


def short_name(name: str) -> str:
    """A name as a label: XML has no control characters, a plot no room for long ones."""
    text = "".join(c if c.isprintable() else " " for c in name)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _svg(figure: Figure, key: str, text: str) -> str:
    """The drawing as an <svg> element for a page: themed, labelled, ids unique, size left to CSS."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    # Several drawings share a page: their ids must differ.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{key}-", svg)
    label = text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _open_tag(label), svg, count=1)


def _open_tag(label: str) -> Callable[[re.Match], str]:
    return lambda found: (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{found[1]}" role="img" aria-label="{label}">'
    )
