"""Templates of the pages, filled in: Jinja escapes every string, the only markup taken as it is are our drawings."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined

from mptrain.report.row import Row


def fill(template: str, **values: Any) -> str:
    """The page of a template of this package. Values lack nothing that it names; `plots`: by key, those it may show."""
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(style=_read("style.css"), **values)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def figures(which: Literal["plots", "compared"], facts: Row) -> dict[str, Any]:
    """By key, what that function of `plots` draws of the facts; nothing without matplotlib."""
    try:
        from mptrain.report.render.plots import compared, plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return {}
    return {plot.key: plot for plot in {"plots": plots, "compared": compared}[which](facts)}
