"""The folder of an exported model: made in a temporary place beside it, moved when it is whole."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(folder: Path, config: Any = None, processor: Any = None) -> Iterator[Path]:
    """Yields an empty folder for the model's files; when the block ends well it takes the place of `folder`.

    What an export that was killed left of its temporary folder is deleted.
    config: of the model, written as config.json without what an exported model has no use for. processor: saved too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.mptrain-"  # no name that a user's own folder beside it may have
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        yield scratch
        if config is not None:
            described = config.to_dict()
            described.pop("auto_map", None)  # an exported model needs no modeling code
            (scratch / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
        if processor is not None:
            processor.save_pretrained(scratch)
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def size(package: Path) -> int:
    """Bytes of all files below a package."""
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
