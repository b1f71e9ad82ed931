"""`mptrain report`: a run's report in the terminal, and its pages written again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mptrain.core.errors import UserError

HELP = "print the report of a run and write its pages again"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run, e.g. runs/jpqd-bert")


def run(options: argparse.Namespace) -> int:
    from mptrain.report.render.files import read, render

    folder = Path(options.run)
    if (folder / "run.json").is_file() and not (folder / "report.json").is_file():
        raise UserError(f"{folder}: this run is not finished; run its recipe again to continue it.")
    report = read(folder)
    folder = folder if folder.is_dir() else folder.parent
    render(report, folder)
    show(report, folder)
    return 0


def show(report: dict[str, Any], folder: Path) -> None:
    """Print the report, and where its page is."""
    from mptrain.core import console
    from mptrain.report.render.terminal import summary

    console.show(summary(report))
    print(f"Report: {folder / 'report.html'}")
