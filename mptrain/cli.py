"""The command line. Parses and calls; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mptrain.core.errors import MptrainError, UserError

EXIT = (
    """exit status: 0 done, 1 the run failed, 2 wrong input, 3 a gate of the recipe was missed, 130 stopped by Ctrl-C"""
)


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
    parser = _parser()
    options = parser.parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mptrain", description="Make trained networks small and fast while training them.", epilog=EXIT
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipe = commands.add_parser("recipe", help="run a recipe", description="Run a recipe, or continue its run.")
    recipe.add_argument("recipe", metavar="FILE|NAME", help="a recipe file, or the name of a bundled recipe")
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value; stages by id: --set stages.jpqd.train.lr=1e-5 (may be repeated)",
    )
    recipe.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2,…",
        help="run every value (several --sweep: every combination), each under <output.dir>-sweep; keys as in --set",
    )
    recipe.add_argument("--dry-run", action="store_true", help="print stages, steps and predicted sizes, run nothing")
    recipe.add_argument("--fresh", action="store_true", help="delete the run in output.dir and start again")
    recipe.add_argument("--resume", action="store_true", help="continue the run in output.dir; it must exist")
    recipe.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="RUN",
        help="take over the stages that the run in this folder has in common with this one (may be repeated)",
    )
    recipe.add_argument(
        "--allow-code", action="store_true", help="let the recipe run code: trust_remote_code and modeling files"
    )
    recipe.set_defaults(call=_recipe)

    listing = commands.add_parser("list", help="list the bundled recipes and launcher configurations")
    listing.set_defaults(call=_list)

    show = commands.add_parser("show", help="print a recipe file unchanged")
    show.add_argument("recipe", metavar="FILE|NAME")
    show.set_defaults(call=_show)

    copy = commands.add_parser("copy", help="copy a bundled recipe or launcher configuration, to edit or use it")
    copy.add_argument("recipe", metavar="NAME")
    copy.add_argument("to", nargs="?", default=".", metavar="FILE|FOLDER", help="default: this folder")
    copy.set_defaults(call=_copy)

    validate = commands.add_parser("validate", help="check a recipe")
    validate.add_argument("recipe", metavar="FILE|NAME")
    validate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    validate.set_defaults(call=_validate)

    schema = commands.add_parser("schema", help="print the JSON schema of recipes")
    schema.set_defaults(call=_schema)

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
    _add_model_options(inspect)
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

    report = commands.add_parser("report", help="print the report of a run and write its pages again")
    report.add_argument("run", metavar="RUN", help="the folder of a run, e.g. runs/jpqd-bert")
    report.set_defaults(call=_report)

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
    _add_model_options(export)
    export.set_defaults(call=_export)

    parser.add_argument("--version", action="version", version=_version())
    return parser


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """Of the commands that take a model and run it on inputs."""
    command.add_argument("--data", metavar="FILE", help="texts (csv, jsonl, txt…) or a recipe whose data is used")
    command.add_argument("--task", help="what the model does; default: from its head")
    command.add_argument("--attn", choices=["sdpa", "eager"], help="default: the model's own")
    command.add_argument("--samples", type=int, default=32, help="inputs to run on (default 32)")
    command.add_argument("--max-length", type=int, default=128, help="tokens of a text (default 128)")
    command.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")
    command.add_argument("--allow-code", action="store_true", help="run code that comes with the model")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mptrain {version('mptrain')}"
    except PackageNotFoundError:
        return "mptrain (not installed)"


def _recipe(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    if options.sweep:
        return _sweep(options)
    found = file.read(options.recipe, options.set)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    if options.dry_run:
        from mptrain.commands.dry_run import dry_run

        print(dry_run(found.recipe, allow_code=options.allow_code))
        return 0
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh exclude each other; give one of them.")
    if options.resume and not (Path(found.recipe.output.dir) / "run.json").is_file():
        raise UserError(f"--resume: there is no run in {found.recipe.output.dir}; leave --resume out to start one.")
    from mptrain.core.errors import GateFailed
    from mptrain.report.render.files import read
    from mptrain.run import run

    folder = Path(found.recipe.output.dir)
    reuse = [Path(run).expanduser() for run in options.reuse]
    try:
        report = run(found.recipe, fresh=options.fresh, allow_code=options.allow_code, reuse=reuse)
    except GateFailed:
        _print_report(read(folder), folder)
        raise
    if report:
        _print_report(report, folder)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from mptrain.commands.sweep import points, sweep

    if options.resume:
        raise UserError("--resume: a sweep continues by itself; leave --resume out.")
    if options.reuse:
        raise UserError("--reuse: a sweep takes over the stages that its points share by itself; leave --reuse out.")
    grid = points(options.recipe, options.set, options.sweep)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    if options.dry_run:
        from mptrain.commands.dry_run import dry_run

        for point in grid:
            print(f"== {', '.join(f'{k}={v}' for k, v in point.values.items())} -> {point.recipe.output.dir}")
            print(dry_run(point.recipe, allow_code=options.allow_code))
        return 0
    found = sweep(grid, fresh=options.fresh, allow_code=options.allow_code)
    if found["points"]:
        from rich.console import Console

        from mptrain.report.render import terminal

        Console(width=None if sys.stdout.isatty() else 120).print(terminal.sweep(found))
        print(f"Sweep: {Path(grid[0].recipe.output.dir).parent / 'sweep.json'}")
    return 0


def _print_report(report: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from mptrain.report.render.terminal import summary

    Console(width=None if sys.stdout.isatty() else 120).print(summary(report))
    print(f"Report: {folder / 'report.html'}")


def _list(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    for path in file.bundled():
        data, _ = file.parse(path.read_text(encoding="utf-8"), str(path))
        print(f"{path.stem:<26} {data.get('description', '')}")
    print("\nFor accelerate launch --config_file, after mptrain copy NAME:")
    for path in file.configs():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{path.stem:<26} {first.removeprefix('# ')}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    path = file.find(options.recipe)
    try:
        sys.stdout.write(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    return 0


def _copy(options: argparse.Namespace) -> int:
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


def _validate(options: argparse.Namespace) -> int:
    from mptrain.recipe import file

    found = file.read(options.recipe, options.set)
    print(f"{found.path}: valid; stages: {', '.join(s.id for s in found.recipe.stages)}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    import json

    from mptrain.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
    return 0


def _check_model_options(options: argparse.Namespace) -> Path | None:
    """Returns the path of --json."""
    from typing import get_args

    from mptrain.recipe import Task

    if options.task is not None and options.task not in get_args(Task):
        raise UserError(f"--task must be one of {', '.join(get_args(Task))}, got {options.task!r}")
    for name in ("samples", "max_length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return _json_target(options)


def _json_target(options: argparse.Namespace) -> Path | None:
    target = Path(options.json) if options.json else None
    if target is not None and not target.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {target.absolute().parent}; make it first.")
    return target


def _export(options: argparse.Namespace) -> int:
    target = _check_model_options(options)
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
        f" same decision in {100 * compared['argmax_agreement']:.1f}%."
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
    target = _check_model_options(options)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    from rich.console import Console

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
    Console(width=None if sys.stdout.isatty() else 120).print(inspection(facts))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    target = _json_target(options)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from mptrain.commands.verify import load_source, verify
    from mptrain.core.errors import ExportError
    from mptrain.report.render.verify import package

    model = None
    if options.model is not None:
        model = load_source(options.model, options.task, options.allow_code)
    facts = verify(Path(options.package), precision=options.precision or "stored", model=model)
    Console(width=None if sys.stdout.isatty() else 120).print(package(facts))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
        print(f"Written: {target}")
    if not facts["passed"]:
        raise ExportError(f"{options.package}: its outputs are wrong; see above.")
    return 0


def _report(options: argparse.Namespace) -> int:
    from mptrain.report.render.files import read, render

    folder = Path(options.run)
    if (folder / "run.json").is_file() and not (folder / "report.json").is_file():
        raise UserError(f"{folder}: this run is not finished; run its recipe again to continue it.")
    report = read(folder)
    folder = folder if folder.is_dir() else folder.parent
    render(report, folder)
    _print_report(report, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
