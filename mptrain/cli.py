"""The command line. Parses and calls; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from mptrain.commands.options import add_model_options, check_model_options, json_target
from mptrain.core.errors import MptrainError

EXIT = (
    """exit status: 0 done, 1 the run failed, 2 wrong input, 3 a gate of the recipe was missed, 130 stopped by Ctrl-C"""
)

COMMANDS = ("recipe", "list", "show", "copy", "validate", "schema", "report", "doctor", "convert-config")
"""a module of mptrain.commands each: HELP, add(parser), run(options) -> exit status"""

# Libraries in other languages raise their own errors, so the text decides: full disk, quota, ulimit.
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
OUT_OF_MEMORY = "out of memory. Lower train.batch_size (and raise accumulation) or data.max_length."
EXTRAS = {
    "openvino_telemetry": "openvino",
    "matplotlib": "plots",
}
"""of mptrain, by the package that is missing; those of the export formats are in their specs"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.call(options)
    except MptrainError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped. The same command continues the run.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = _extra((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed. Install it with: pip install 'mptrain[{extra}]'", 1)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, 1)
    except Exception as error:
        if any(reason in str(error) for reason in NO_SPACE):
            return _fail(f"the disk is full ({error}). Free some space; the same command continues the run.", 1)
        if any(reason in str(error) for reason in NO_MEMORY):
            return _fail(OUT_OF_MEMORY, 1)
        raise


def _extra(module: str) -> str | None:
    """The extra of mptrain that brings a package."""
    from mptrain.recipe import EXPORTS

    found = {p.module.split(".")[0]: spec.extra for spec in EXPORTS.values() for p in spec.packages}
    return (EXTRAS | found).get(module)


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"mptrain: {'' if code == 130 else 'error: '}{message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    found = argparse.ArgumentParser(
        prog="mptrain", description="Make trained networks small and fast while training them.", epilog=EXIT
    )
    commands = found.add_subparsers(required=True, metavar="COMMAND")

    for name in COMMANDS:
        module = import_module(f"mptrain.commands.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP)
        module.add(command)
        command.set_defaults(call=module.run)

    inspect = commands.add_parser(
        "inspect",
        help="memory, overflow and speed of a model in half precision",
        description="Say what half precision would do to a model: memory, overflow, what to keep in fp32, speed here.",
    )
    inspect.add_argument("model", metavar="MODEL", help="a model folder, packaged:NAME or a hub name")
    inspect.add_argument(
        "--precision",
        action="append",
        metavar="NAME",
        help="fp32, fp16-master, bf16-master or bf16-split (may be repeated; default: all)",
    )
    add_model_options(inspect)
    inspect.set_defaults(call=_inspect)

    verify = commands.add_parser(
        "verify",
        help="run a Core ML package anywhere, and compare it with its source",
        description="Run a saved Core ML package in a reference interpreter: an emulation, without a Mac.",
    )
    verify.add_argument("package", metavar="PACKAGE", help="an .mlpackage with an ML program")
    verify.add_argument("--model", metavar="SOURCE", help="compare with this model folder, packaged:NAME or hub name")
    verify.add_argument(
        "--precision", choices=["fp32", "fp16"], help="of the arithmetic; default: what the package declares"
    )
    verify.add_argument("--task", help="what the source model does; default: from its head")
    verify.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")
    verify.add_argument("--allow-code", action="store_true", help="run code that comes with the source model")
    verify.set_defaults(call=_verify)

    export = commands.add_parser(
        "export",
        help="export one model and compare the result with it",
        description="Export a model, run the result, compare it with the torch model. To train or compress: a recipe.",
    )
    export.add_argument("model", metavar="MODEL", help="a model folder (also of a run), packaged:NAME or a hub name")
    export.add_argument("--to", required=True, metavar="FOLDER", help="where to write; must not exist")
    export.add_argument("--format", default="openvino", help="a format of a recipe's export (default openvino)")
    export.add_argument("--precision", default="fp32", help="as in a recipe's export of that format (default fp32)")
    export.add_argument("--target", metavar="iOS18", help="minimum_deployment_target, where the format has one")
    export.add_argument(
        "--cache",
        type=int,
        metavar="N",
        help="causal LM: generate with a key-value cache of N tokens, where the format keeps one",
    )
    add_model_options(export)
    export.set_defaults(call=_export)

    found.add_argument("--version", action="version", version=_version())
    return found


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mptrain {version('mptrain')}"
    except PackageNotFoundError:
        return "mptrain (not installed)"


def _export(options: argparse.Namespace) -> int:
    target = check_model_options(options)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    from mptrain.commands.export import export_model
    from mptrain.core.errors import GateFailed

    chosen = {"minimum_deployment_target": options.target, "cache": options.cache}
    facts = export_model(
        options.model,
        Path(options.to),
        format=options.format,
        precision=options.precision,
        options={k: v for k, v in chosen.items() if v is not None},
        task=options.task,
        attn=options.attn,
        data=options.data,
        samples=options.samples,
        length=options.max_length,
        allow_code=options.allow_code,
    )
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
    compared = facts["parity"]
    print(
        f"{facts['path']}: {facts['size_bytes'] / 1e6:.1f} MB, {facts['precision']}. Against the torch model on"
        f" {compared['examples']} inputs ({facts['inputs']}): largest difference {compared['max_abs_diff']:.2g},"
        f" same decision in {100 * compared['agreement']:.1f}%."
    )
    if half := facts["runtime"].get("half"):
        from mptrain.report.words import kept_in_fp32

        print(f"fp16: {kept_in_fp32(half)}.")
    if cache := facts["runtime"].get("cache"):
        kept = facts["runtime"]["cache_precision"]
        print(f"A key-value cache of {cache:,} tokens in {kept}; judged by {facts['judged_by']}.")
    if not facts["passed"]:
        raise GateFailed(
            f"the exported model differs from the torch model by more than {facts['limit']:g}; it was kept."
            if facts["judged_by"] == "parity"
            else f"the exported model decides as the torch model in less than {100 * facts['limit']:.0f}%; it was kept."
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    target = check_model_options(options)
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
        **chosen,
    )
    show(inspection(facts))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    target = json_target(options)
    from mptrain.core.console import quiet_libraries, show

    quiet_libraries()
    from mptrain.commands.verify import load_source, verify
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


if __name__ == "__main__":
    sys.exit(main())
