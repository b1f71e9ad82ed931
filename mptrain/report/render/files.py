"""Everything a reader gets, from report.json alone: report.md, report.html and README.md."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mptrain.core.errors import UserError
from mptrain.report.build import SCHEMA
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page
from mptrain.report.upgrade import upgraded

log = logging.getLogger(__name__)

FILE = "report.json"
PAGES: dict[str, Callable[[dict[str, Any]], str]] = {"report.md": markdown, "report.html": page, "README.md": card}
_KEYS: tuple[str, ...] = (
    "baseline",
    "comparisons",
    "data",
    "gates",
    "history",
    "host",
    "metric",
    "notes",
    "recipe",
    "recommendation",
)
_KEYS += ("structure", "task", "training", "variants", "versions", "wall_s")


def render(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pages into `folder`; one that cannot be drawn is a warning, and what is there of it stays.

    Raises UserError for a folder that cannot be written, OSError for a full disk.
    """
    texts = {}
    for name, draw in PAGES.items():
        try:
            texts[name] = draw(report)
        except Exception as error:  # a fault of a page costs neither the numbers nor the other pages
            log.warning(
                "%s cannot be drawn (%s: %s). Nothing is lost, all of it is in %s: `mptrain report %s` draws it again,"
                " with this version of mptrain or a later one.", name, type(error).__name__, error, FILE, folder,
            )  # fmt: skip
            log.debug("%s", name, exc_info=error)
    try:
        for name, text in texts.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, folder / name)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR):
            raise  # a full disk is nobody's wrong input
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Give it room and the right to write, then run the command"
            f" again; or, of a finished run, copy {FILE} to another folder and run `mptrain report` on that."
        ) from error
    return [folder / name for name in texts]


def read(folder: Path) -> dict[str, Any]:
    """The report of a run folder, or of the path of a report.json. Raises UserError, also for one that lacks parts."""
    path = folder / FILE if folder.is_dir() else folder
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no report here. A run writes it at its end; give the folder of a finished run."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable report ({error}). Run the recipe again to rebuild it.") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: its schema is {schema!r}, this version reads {SCHEMA!r}. Run the recipe again.")
    missing = [key for key in _KEYS if key not in report]
    if missing:
        raise UserError(
            f"{path}: it lacks {', '.join(missing)}, for another version of mptrain wrote it. Run the recipe again, or"
            " print it with the version that its `versions` name."
        )
    return upgraded(report)
