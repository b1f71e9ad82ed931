"""`mptrain schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import argparse
import json

HELP = "print the JSON schema of recipes"


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from mptrain.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
    return 0
