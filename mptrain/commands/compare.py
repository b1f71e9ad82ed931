"""`mptrain compare`: runs, or variants of them, in one table and on one page."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.core.errors import UserError

if TYPE_CHECKING:
    from mptrain.report.compare import Run

HELP = "compare runs: differences, the front of size, latency and score, what differs in the recipes"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="the folder of a run or of a sweep; RUN:VARIANT for one of its variants"
    )
    parser.add_argument(
        "--reference",
        metavar="RUN[:VARIANT]",
        help="what differences are to, as the table names it; default: the baseline of the first run",
    )
    parser.add_argument("--setting", metavar="KEY", help="of latency, e.g. b1_s128_t1; default: one that all have")
    parser.add_argument("--to", metavar="FOLDER", default="comparison", help="of the pages (default: comparison)")


def run(options: argparse.Namespace) -> int:
    from mptrain.report.compare import compare

    found = compare(runs_of(options.runs), reference=options.reference, setting=options.setting)
    show(found, Path(options.to))
    return 0


def show(found: dict[str, Any], folder: Path) -> None:
    """Print the comparison and write its pages into `folder`. Raises UserError where that cannot be."""
    from mptrain.core import console
    from mptrain.report.render import compare
    from mptrain.report.render.terminal import comparison

    console.show(comparison(found))
    try:
        page = compare.write(found, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder with --to.") from error
    print(f"Comparison: {page}")


def runs_of(given: Sequence[str]) -> list[Run]:
    """The runs that words of the command line name, those of one folder together, named by what tells them apart.

    Raises UserError for what is no run, or has no such variant, and for one that is given twice.
    """
    from mptrain.report.compare import Run
    from mptrain.report.render.files import read

    wanted: dict[Path, list[str]] = {}
    for word in given:
        folders, variant = _folders(word)
        for folder in folders:
            chosen = wanted.setdefault(folder, [])
            if variant in chosen or (chosen and "" in (variant, *chosen)):
                raise UserError(f"compare: {word} is given twice; leave one out.")
            chosen.append(variant)
    reports = {folder: read(folder) for folder in wanted}
    names = _names(list(wanted))
    found = []
    for folder, chosen in wanted.items():
        there = [v["id"] for v in reports[folder]["variants"]]
        for variant in chosen:
            if variant and variant not in there:
                raise UserError(f"{folder}: there is no variant {variant}; its variants are {', '.join(there)}.")
        variants = tuple(v for v in there if "" in chosen or v in chosen)
        home = folder if folder.is_dir() else folder.parent
        found.append(Run(names[folder], home, reports[folder], variants))
    return found


def _folders(word: str) -> tuple[list[Path], str]:
    """The runs that a word names, and the one variant of them; "" for all."""
    path, variant = Path(word).expanduser(), ""
    if not path.exists():
        before, colon, after = word.rpartition(":")
        if colon and Path(before).expanduser().exists():
            path, variant = Path(before).expanduser(), after
    if not (path / "sweep.json").is_file():
        return [path], variant
    try:
        points = json.loads((path / "sweep.json").read_text(encoding="utf-8"))["points"]
        return [path / point["folder"] for point in points], variant
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/sweep.json: not the file of a sweep ({error}); name its runs one by one.") from None


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Of each folder as many last parts as tell it from the others."""
    parts = {folder: folder.absolute().with_suffix("").parts if folder.suffix == ".json" else folder.absolute().parts
             for folder in folders}  # fmt: skip
    length = 1
    while True:
        names = {folder: "/".join(found[-length:]) for folder, found in parts.items()}
        if max(Counter(names.values()).values()) == 1 or length > max(map(len, parts.values())):
            return names
        length += 1
