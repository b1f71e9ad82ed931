"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from mptrain.core.errors import UserError


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Of the commands that take a model and run it on inputs."""
    command.add_argument(
        "--data",
        metavar="FILE",
        help="texts (csv, jsonl, txt…), a folder of pictures or sounds, or a recipe whose data is used",
    )
    command.add_argument("--task", help="what the model does; default: from its head")
    command.add_argument("--attn", choices=["sdpa", "eager"], help="default: the model's own")
    command.add_argument("--samples", type=int, default=32, help="inputs to run on (default 32)")
    command.add_argument("--max-length", type=int, default=128, help="tokens of a text (default 128)")
    command.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")
    command.add_argument("--allow-code", action="store_true", help="run code that comes with the model")


def check_model_options(options: argparse.Namespace) -> Path | None:
    """Returns the path of --json."""
    from mptrain.recipe import tasks

    if options.task is not None:
        tasks.check(options.task, "--task")
    for name in ("samples", "max_length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return json_target(options)


def json_target(options: argparse.Namespace) -> Path | None:
    target = Path(options.json) if options.json else None
    if target is not None and not target.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {target.absolute().parent}; make it first.")
    return target


def add_head_option(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"{what}, in this order: softmax, topk=20, argmax, pool=mean, pool=cls, normalize (may be repeated)",
    )


def head_item(text: str) -> dict[str, object]:
    """ "topk=20" as an item of a recipe's heads."""
    from mptrain.recipe.file import scalar

    name, equals, value = text.partition("=")
    return {name: scalar(value) if equals else True}
