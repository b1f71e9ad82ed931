"""Everything a reader gets, from report.json alone: report.md, report.html and README.md."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from mptrain.core.errors import UserError
from mptrain.report.build import SCHEMA
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page
from mptrain.report.upgrade import upgraded

FILE = "report.json"
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
    """Write the three files into `folder`; none is touched unless all could be rendered. Raises UserError."""
    texts = {"report.md": markdown(report), "report.html": page(report), "README.md": card(report)}
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
