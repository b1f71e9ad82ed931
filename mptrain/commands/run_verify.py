"""The command line of `mptrain verify`; the work is in verify.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from mptrain.commands.options import json_target

HELP = "run a Core ML package anywhere, and compare it with its source"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a saved Core ML package in a reference interpreter: an emulation, without a Mac."
    parser.add_argument("package", metavar="PACKAGE", help="an .mlpackage with an ML program")
    parser.add_argument("--model", metavar="SOURCE", help="compare with this model folder, packaged:NAME or hub name")
    parser.add_argument(
        "--precision", choices=["fp32", "fp16"], help="of the arithmetic; default: what the package declares"
    )
    parser.add_argument("--task", help="what the source model does; default: from its head")
    parser.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")
    parser.add_argument("--allow-code", action="store_true", help="run code that comes with the source model")


def run(options: argparse.Namespace) -> int:
    target = json_target(options)
    from mptrain.core.console import quiet_libraries, show

    quiet_libraries()
    from mptrain.commands.verify import verify
    from mptrain.commands.verify_source import load_source
    from mptrain.core.errors import ExportError
    from mptrain.report.render.verify import package

    model = None
    if options.model is not None:
        model = load_source(options.model, options.task, options.allow_code)
    facts = verify(Path(options.package), precision=options.precision or "stored", model=model)
    show(package(facts))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    if not facts["passed"]:
        raise ExportError(f"{options.package}: its outputs are wrong; see above.")
    return 0
