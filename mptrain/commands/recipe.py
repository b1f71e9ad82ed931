"""`mptrain recipe`: run a recipe, print what it would do, or run a sweep of it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mptrain.core.errors import GateFailed, UserError

HELP = "run a recipe"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a recipe, or continue its run."
    parser.add_argument("recipe", metavar="FILE|NAME", help="a recipe file, or the name of a bundled recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value; stages by id: --set stages.jpqd.train.lr=1e-5; preset=NAME: those of a preset of the"
        " recipe (may be repeated)",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2,…",
        help="run every value (several --sweep: every combination), each under <output.dir>-sweep; keys as in --set",
    )
    parser.add_argument("--dry-run", action="store_true", help="print stages, steps and predicted sizes, run nothing")
    parser.add_argument(
        "--launch",
        metavar="FILE|NAME",
        help="with --dry-run: as this file of accelerate launch would start it, or a bundled one (mptrain list)",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the run in output.dir and start again")
    parser.add_argument("--resume", action="store_true", help="continue the run in output.dir; it must exist")
    parser.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="RUN",
        help="take over the stages that the run in this folder has in common with this one (may be repeated)",
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="let the recipe run code: trust_remote_code and modeling files"
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="let weight_only and palettize leave more than half of a model's parameters alone (allow_partial: true)",
    )


def run(options: argparse.Namespace) -> int:
    if options.launch is not None and not options.dry_run:
        raise UserError("--launch goes with --dry-run; to train so: accelerate launch --config_file FILE -m mptrain …")
    if options.sweep:
        return _sweep(options)
    from mptrain.core.console import quiet_libraries
    from mptrain.recipe import file

    recipe = file.read(options.recipe, options.set).recipe
    if options.allow_partial:
        recipe = recipe.allowing_partial()
    quiet_libraries()
    if options.dry_run:
        from mptrain.commands.dry_run import dry_run

        print(dry_run(recipe, allow_code=options.allow_code, launch=options.launch))
        return 0
    folder = Path(recipe.output.dir)
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh exclude each other; give one of them.")
    if options.resume and not (folder / "run.json").is_file():
        raise UserError(f"--resume: there is no run in {folder}; leave --resume out to start one.")
    from mptrain.commands.report import show
    from mptrain.report.render.files import read
    from mptrain.run import run as run_recipe

    reuse = [Path(run).expanduser() for run in options.reuse]
    try:
        report = run_recipe(recipe, fresh=options.fresh, allow_code=options.allow_code, reuse=reuse)
    except GateFailed:
        show(read(folder), folder)
        raise
    if report:  # the main process
        show(report, folder)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from mptrain.commands.sweep import points, sweep

    if options.resume:
        raise UserError("--resume: a sweep continues by itself; leave --resume out.")
    if options.reuse:
        raise UserError("--reuse: a sweep takes over the stages that its points share by itself; leave --reuse out.")
    grid = points(options.recipe, options.set, options.sweep)
    if options.allow_partial:
        grid = [replace(point, recipe=point.recipe.allowing_partial()) for point in grid]
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    if options.dry_run:
        from mptrain.commands.dry_run import dry_run

        for point in grid:
            print(f"== {', '.join(f'{k}={v}' for k, v in point.values.items())} -> {point.recipe.output.dir}")
            print(dry_run(point.recipe, allow_code=options.allow_code, launch=options.launch))
        return 0
    found = sweep(grid, fresh=options.fresh, allow_code=options.allow_code)
    if found["points"]:
        from mptrain.commands.compare import runs_of, show
        from mptrain.report.compare import compare

        top = Path(grid[0].recipe.output.dir).parent
        show(compare(runs_of([str(top)])), top)
        print(f"Sweep: {top / 'sweep.json'}")
    return 0
