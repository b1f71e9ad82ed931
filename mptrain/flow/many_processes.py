"""What of a recipe does not go with the way its processes are launched, said before any training."""

from __future__ import annotations

from collections.abc import Callable

from mptrain.core.errors import UserError
from mptrain.recipe import Recipe, Stage
from mptrain.recipe.plan import phases
from mptrain.train import launch
from mptrain.train.launch import Launch


def check(recipe: Recipe, launched: Launch, rows: Callable[[Stage], int]) -> None:
    """rows: examples that a stage trains on. Raises UserError."""
    launch.check(launched, recipe.precision)
    if launched.sharding != "fsdp2":
        return
    if launched.one_loads:
        raise launch.on_one_process("the stages of a recipe begin with the whole model on every process")
    for stage in recipe.stages:
        for phase in phases(stage, rows(stage), launched.processes):
            for method in stage.methods if phase.steps else ():
                if method.field in phase.methods and (why := method.why_not_sharded()):
                    raise UserError(f"stages.{stage.id}.{method.field}.{why}.")
