"""`mptrain validate`: is a recipe right?"""

from __future__ import annotations

import argparse

HELP = "check a recipe"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="FILE|NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `mptrain recipe`")


def run(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    found = file.read(options.recipe, options.set)
    print(f"{found.path}: valid; stages: {', '.join(s.id for s in found.recipe.stages)}")
    return 0
