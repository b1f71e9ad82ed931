"""`mptrain show`: a recipe file as it is."""

from __future__ import annotations

import argparse
import sys

from mptrain.core.errors import UserError

HELP = "print a recipe file unchanged"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="FILE|NAME")


def run(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    path = file.find(options.recipe)
    try:
        sys.stdout.write(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    return 0
