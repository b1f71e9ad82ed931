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
from mptrain.core.errors import DataError, GateFailed
from mptrain.core.host import host
from mptrain.data.lm_eval.questions import MultipleChoice, context_length, read_tasks
from mptrain.data.load import load_data
from mptrain.export.torch.cached_decoder import check_exports
from mptrain.flow import input_checks, preflight
from mptrain.flow.identity import identity, versions
from mptrain.flow.reuse import check_reuse, take_stages
from mptrain.flow.run_folder import check_identity, clear, locked
from mptrain.flow.stage import Context, keep_start, method_facts, run_phase
from mptrain.flow.stage_inputs import inputs_of
from mptrain.flow.variants import Variants
from mptrain.models.load import load_processor, read_config
from mptrain.recipe import Recipe
from mptrain.recipe.plan import phases
from mptrain.report import build
from mptrain.report.render import files
from mptrain.train.launch import state

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
        raise GateFailed("; ".join(_missed(g) for g in failed) + f". The full report is in {folder}/report.html.")
    return report


def _steps(
    recipe: Recipe, peers: Any, folder: Path, allow_code: bool, reuse: Sequence[Path], fresh: bool = False
) -> dict[str, Any]:
    preflight.check_exports(recipe)
    if any(export.cache for export in recipe.export):
        check_exports(recipe, read_config(recipe.model, allow_code))
    model = preflight.model_of(recipe, allow_code)
    if model is not None:
        preflight.check_model(recipe, model)
    processor = load_processor(recipe.model, allow_code)
    data = load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed)
    preflight.check_data(recipe, data, peers.num_processes)
    input_checks.check(recipe, data, read_config(recipe.model, allow_code), allow_code=allow_code)
    preflight.check_head(recipe, data, allow_code)
    questions = read_questions(recipe, processor, allow_code)
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

    plan = {s.id: phases(s, len(data.train), peers.num_processes) for s in recipe.stages}
    context = Context(inputs_of(recipe), data, processor, folder, plan, peers, allow_code)
    if recipe.baseline == "model":
        keep_start(context, recipe.model, recipe.seed)
    trained = [(phase, run_phase(context, phase)) for stage in recipe.stages for phase in plan[stage.id]]
    if not peers.is_main_process:
        return {}

    made = Variants(context, recipe, questions)
    exported = [made.export(v) for v in made.wanted()]
    verified = [made.verify(v) for v in exported]
    measured = made.measure([made.evaluate(v) for v in verified])
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
    files.render(report, folder)
    return report


def read_questions(recipe: Recipe, tokenizer: Any, allow_code: bool) -> list[MultipleChoice]:
    """The tasks of evaluate.multiple_choice. Raises DataError, also for an input that an export cannot read."""
    if not recipe.evaluate.multiple_choice:
        return []
    length = context_length(read_config(recipe.model, allow_code), tokenizer)
    tasks = read_tasks(recipe.evaluate.multiple_choice, tokenizer, length)
    for export in recipe.export:
        limit = export.longest()
        for task in tasks:
            if limit is not None and task.longest > limit.tokens:
                raise DataError(
                    f"export.{export.id}.{limit.field}: {limit.tokens} is less than the {task.longest} tokens of the"
                    f" longest question of {task.facts['file']}; raise it, or drop the task from"
                    " evaluate.multiple_choice."
                )
    return tasks


def seconds(phases: dict[str, float]) -> dict[str, float]:
    return phases | {"total": round(sum(phases.values()), 3)}


def _missed(gate: dict[str, Any]) -> str:
    return f"gate {gate['name']} missed: {gate['value']} against a limit of {gate['limit']}"
