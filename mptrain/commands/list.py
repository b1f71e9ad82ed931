"""`mptrain list`: what is bundled."""

from __future__ import annotations

import argparse

HELP = "list the bundled recipes and launcher configurations"


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    for path in file.bundled():
        data, _ = file.parse(path.read_text(encoding="utf-8"), str(path))
        print(f"{path.stem:<26} {data.get('description', '')}")
    print("\nFor accelerate launch --config_file, after mptrain copy NAME:")
    for path in file.configs():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{path.stem:<26} {first.removeprefix('# ')}")
    return 0
