"""Opening an asset: whole, or refused with a reason.

Core AI's own parser ends the process on a program that is cut or changed. Beside each program `NAME.mlirb` lies
`NAME.hash`, its SHA-256, which the library writes and does not read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from mptrain.core.disk import sha256
from mptrain.core.errors import ExportError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations inside the package
    from coreai.authoring.asset import AIModelAsset


def load(path: Path) -> Any:
    """The library's asset. Raises ExportError for a folder that is none, or whose programs are not as they were
    written."""
    if not AIModelAsset.is_valid(path):
        raise ExportError(f"{path} is no Core AI asset: give the path of an .aimodel folder")
    programs = sorted(path.glob("*.mlirb"))
    if not programs:
        raise ExportError(f"{path} holds no program (main.mlirb); copy it again.")
    for program in programs:
        written = program.with_suffix(".hash")
        if not written.is_file() or written.read_bytes().hex() != sha256(program):
            raise ExportError(
                f"{program} is not as it was written: its SHA-256 is not that of {written.name}. Copy the asset again,"
                " or export it again."
            )
    return AIModelAsset.load(path)
