"""The command line of `mptrain verify`; the work is in verify.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mptrain.commands.options import add_head_option, head_item, json_target

HELP = "say what an exported model holds and does, and compare it with its source"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run an exported model: OpenVINO IR, ONNX and Core AI by their runtimes, any Core ML package in a reference"
        " interpreter, without a Mac. Says types, casts, attention and layers as they run."
    )
    parser.add_argument(
        "package", metavar="PACKAGE", help="an .xml, .onnx, .aimodel or .mlpackage, or a folder with one"
    )
    parser.add_argument("--model", metavar="SOURCE", help="compare with this model folder, packaged:NAME or hub name")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        help="Core ML: of the emulated arithmetic; default: what the package declares",
    )
    parser.add_argument("--task", help="what the source model does; default: from its head")
    parser.add_argument("--data", metavar="FILE", help="beside --model: texts or a recipe to compare on")
    parser.add_argument("--samples", type=int, default=32, help="inputs to compare on (default 32)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default 128)")
    add_head_option(parser, "beside --model: what the export was told to compute after the model")
    parser.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")
    parser.add_argument("--allow-code", action="store_true", help="run code that comes with the source model")


def run(options: argparse.Namespace) -> int:
    target = json_target(options)
    from mptrain.core.console import quiet_libraries, show

    quiet_libraries()
    from mptrain.commands.verify_file import INTERPRETED, found_in
    from mptrain.core.errors import ExportError

    path, spec = found_in(Path(options.package))
    facts, shown = (_interpreted if spec.ending in INTERPRETED else _executed)(path, spec, options)
    show(shown)
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    if not facts["passed"]:
        raise ExportError(f"{options.package}: its outputs are wrong; see above.")
    return 0


def _interpreted(path: Path, spec: Any, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from mptrain.commands.verify import verify
    from mptrain.commands.verify_source import load_source
    from mptrain.core.errors import UserError
    from mptrain.report.render.verify import package

    model = None
    if options.head:
        raise UserError(f"--head {options.head[0]}: is for what is run; {path} is emulated, and compared without heads")
    if options.model is not None:
        model = load_source(options.model, options.task, options.allow_code)
    facts = verify(path, precision=options.precision or "stored", model=model)
    return facts, package(facts)


def _executed(path: Path, spec: Any, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from mptrain.commands.verify_file import verify_file
    from mptrain.core.errors import UserError
    from mptrain.models.samples import load_with_inputs
    from mptrain.report.render.verify import file

    if options.precision is not None:
        raise UserError(f"--precision {options.precision}: is for Core ML packages, which are emulated; {path} is run")
    if options.head and options.model is None:
        raise UserError(f"--head {options.head[0]}: is of the source model's outputs; give --model too")
    source = None
    if options.model is not None:
        how = (options.task, None, options.data, options.samples, options.max_length, options.allow_code)
        source = load_with_inputs(options.model, *how)
    facts = verify_file(path, spec, source, [head_item(text) for text in options.head])
    return facts, file(facts)
