"""`mptrain report`: a run's report in the terminal, and its pages written again."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mptrain.core.errors import UserError

log = logging.getLogger(__name__)

HELP = "print the report of a run and write its pages again"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run, e.g. runs/jpqd-bert")


def run(options: argparse.Namespace) -> int:
    from mptrain.report.render.files import PAGES, read, render

    folder = Path(options.run)
    if (folder / "run.json").is_file() and not (folder / "report.json").is_file():
        raise UserError(f"{folder}: this run is not finished; run its recipe again to continue it.")
    report = read(folder)
    folder = folder if folder.is_dir() else folder.parent
    written = render(report, folder)
    show(report, folder)
    return 0 if len(written) == len(PAGES) else 1


def show(report: dict[str, Any], folder: Path) -> None:
    """Print the report, and where its page is."""
    from mptrain.core import console
    from mptrain.report.render.terminal import summary

    try:
        shown = summary(report)
    except Exception as error:  # the run is whole whatever becomes of its table here
        log.warning("the report cannot be shown here (%s: %s); it is in %s", type(error).__name__, error, folder)
        log.debug("the summary", exc_info=error)
    else:
        console.show(shown)
    page = folder / "report.html"
    print(f"Report: {page if page.is_file() else folder / 'report.json'}")
