"""The flow: recipe → inputs → train(phases) → export → verify → report. Each step is done once and kept.

A step that is whole on disk is not done again, so the same command continues a run that
was killed anywhere, and prints the report of a finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mptrain.core.disk import write_json
from mptrain.core.errors import GateFailed, UserError
from mptrain.core.host import host
from mptrain.flow import many_processes, preflight
from mptrain.flow.context import Context
from mptrain.flow.identity import identity, versions
from mptrain.flow.reuse import check_reuse, take_stages
from mptrain.flow.run_folder import check_identity, clear, locked
from mptrain.flow.stage import keep_start, method_facts, run_phase
from mptrain.flow.stage_inputs import inputs_of
from mptrain.flow.variants import Variants
from mptrain.recipe import Recipe
from mptrain.recipe.plan import phases
from mptrain.report import build
from mptrain.report.gates import missed
from mptrain.report.render import files
from mptrain.train.launch import current, state

log = logging.getLogger(__name__)

REPORT = "report.json"


def run(recipe: Recipe, *, fresh: bool = False, allow_code: bool = False, reuse: Sequence[Path] = ()) -> dict[str, Any]:
    """Run a recipe, or what is left of it, in recipe.output.dir.

    fresh: delete what is there and start again. allow_code: let the recipe run code that comes with models. reuse:
    folders of other runs; stages that they have in common with this one are taken over.
    Returns the report. Raises MptrainError and its kinds; a missed gate is GateFailed after the
    report was written.
    """
    peers = state()
    folder = Path(recipe.output.dir)
    if not peers.is_main_process:
        peers.wait_for_everyone()  # the main process checks the folder first
        _steps(recipe, peers, folder, allow_code, reuse)
        peers.wait_for_everyone()
        return {}
    fresh = fresh or recipe.output.resume == "never"
    check_reuse(reuse, folder if fresh else None)
    with locked(folder):
        peers.wait_for_everyone()
        report = _steps(recipe, peers, folder, allow_code, reuse, fresh)
        peers.wait_for_everyone()
    failed = [g for g in report["gates"] if not g["passed"]]
    if failed:
        raise GateFailed("; ".join(missed(g) for g in failed) + f". The full report is in {folder}/report.html.")
    return report


def _steps(
    recipe: Recipe, peers: Any, folder: Path, allow_code: bool, reuse: Sequence[Path], fresh: bool = False
) -> dict[str, Any]:
    inputs = preflight.check(recipe, allow_code=allow_code, processes=peers.num_processes)
    data, questions = inputs.data, inputs.questions
    assert data is not None  # only a dry run does without
    many_processes.check(recipe, current(peers.num_processes), data.rows)
    if peers.is_main_process:
        described = identity(recipe, data, peers.num_processes, questions, allow_code=allow_code)
        if fresh:
            clear(folder)  # now that all inputs are good
        check_identity(folder, described)
        take_stages(folder, described, reuse)
    peers.wait_for_everyone()
    if (folder / REPORT).is_file():  # all ranks leave here together, or none does
        log.info("%s is finished; this is its report. --fresh runs it again.", folder)
        return files.read(folder)

    plan = {s.id: phases(s, data.rows(s), peers.num_processes) for s in recipe.stages}
    context = Context(inputs_of(recipe), data, inputs.processor, folder, plan, peers, allow_code)
    if recipe.baseline == "model":
        keep_start(context, recipe.model, recipe.seed)
    trained = [(phase, run_phase(context, phase)) for stage in recipe.stages for phase in plan[stage.id]]
    if not peers.is_main_process:
        return {}

    made = Variants(context, recipe, questions)
    exported = [made.export(v) for v in made.wanted()]
    verified = [made.verify(v) for v in exported]
    measured = made.measure([made.generate(made.evaluate(v)) for v in verified])
    report = build.build(
        recipe,
        versions=versions(),
        host=host(),
        wall_s=seconds({f"{p.stage}/{p.name}": facts["wall_s"] for p, facts in trained} | made.wall_s()),
        variants=measured,
        floor=made.floor(),
        history=[row for _, facts in trained for row in facts["history"]],
        methods=method_facts(context),
        data_facts=data.facts,
        multiple_choice={task.name: task.facts for task in questions},
        checkpoints={s.id: str(context.model_folder(s.id).relative_to(folder)) for s in recipe.stages},
    )
    write_json(folder / REPORT, report)  # the truth first: a page that cannot be rendered never costs the run
    try:
        files.render(report, folder)
    except (UserError, OSError) as error:
        log.warning("%s The numbers are in %s; `mptrain report %s` writes the pages again.", error, REPORT, folder)
    return report


def seconds(phases: dict[str, float]) -> dict[str, float]:
    return phases | {"total": round(sum(phases.values()), 3)}
