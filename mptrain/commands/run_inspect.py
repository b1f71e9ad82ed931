"""The command line of `mptrain inspect`; the work is in inspect.py."""

from __future__ import annotations

import argparse

from mptrain.commands.options import add_model_options, check_model_options
from mptrain.core.errors import UserError

HELP = "what can be cut out of a model; its memory, overflow and speed in half precision"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what can be cut out of a model, and what half precision would do to it: memory, overflow, what to keep in"
        " fp32, speed here."
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, packaged:NAME or a hub name")
    parser.add_argument(
        "--precision",
        action="append",
        metavar="NAME",
        help="fp32, fp16-master, bf16-master, bf16-split or bf16-split-int8 (may be repeated; default: all)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="also the memory of each of N processes that share the training under FSDP2",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    target = check_model_options(options)
    if options.processes < 1:
        raise UserError(f"--processes must be 1 or more, got {options.processes}")
    from mptrain.core.console import quiet_libraries, show

    quiet_libraries()
    from mptrain.commands.inspect import inspect_model
    from mptrain.report.render.inspect import inspection

    chosen = {"precisions": options.precision} if options.precision else {}
    facts = inspect_model(
        options.model,
        task=options.task,
        attn=options.attn,
        data=options.data,
        samples=options.samples,
        length=options.max_length,
        allow_code=options.allow_code,
        processes=options.processes,
        **chosen,
    )
    show(inspection(facts))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    return 0
