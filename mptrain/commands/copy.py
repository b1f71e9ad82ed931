"""`mptrain copy`: a bundled file, to edit or use it."""

from __future__ import annotations

import argparse
from pathlib import Path

from mptrain.core.errors import UserError

HELP = "copy a bundled recipe or launcher configuration, to edit or use it"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="NAME")
    parser.add_argument("to", nargs="?", default=".", metavar="FILE|FOLDER", help="default: this folder")


def run(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    config = {path.stem: path for path in file.configs()}.get(options.recipe.removesuffix(".yaml"))
    source = config or file.find(options.recipe)
    target = Path(options.to)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} exists already; choose another name: mptrain copy {source.stem} my-recipe.yaml")
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}). Choose another folder.") from None
    use = f"accelerate launch --config_file {target} -m mptrain recipe NAME" if config else f"mptrain recipe {target}"
    print(f"{target} written. Edit it, then: {use}")
    return 0
