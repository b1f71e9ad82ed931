"""What of a recipe does not go with the way its processes are launched, said before any training."""

from __future__ import annotations

from collections.abc import Callable

from mptrain.core.errors import UserError
from mptrain.recipe import Recipe, Stage
from mptrain.recipe.plan import phases
from mptrain.train.launch import DEEPSPEED, Launch


def check(recipe: Recipe, launch: Launch, rows: Callable[[Stage], int]) -> None:
    """rows: examples that a stage trains on. Raises UserError."""
    half = recipe.precision.compute != "fp32"
    if launch.sharding == "deepspeed":
        raise UserError(f"{DEEPSPEED}.")
    if launch.sharding == "fsdp1":
        raise UserError(
            "FSDP1 is not supported: write fsdp_version: 2 in the fsdp_config of the launcher's file"
            " (mptrain copy accelerate-fsdp2-2gpu)."
        )
    if half and launch.mixed_precision != "no":
        raise UserError(
            f"precision and Accelerate's mixed_precision={launch.mixed_precision!r} exclude each other: write"
            " mixed_precision: 'no' in the launcher's file."
        )
    if launch.sharding != "fsdp2":
        return
    if launch.one_loads:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: the stages of a recipe begin with the whole model on every process; write"
            " false in the launcher's file."
        )
    if recipe.precision.master == "split":
        raise UserError(
            "precision.master: split keeps half of the master in the half weight, which FSDP2 does not keep; use fp32"
            f" (bf16-master){' and drop moments: int8' if recipe.precision.moments == 'int8' else ''}."
        )
    for stage in recipe.stages:
        for phase in phases(stage, rows(stage), launch.processes):
            for method in stage.methods if phase.steps else ():
                if method.field in phase.methods and (why := method.why_not_sharded()):
                    raise UserError(f"stages.{stage.id}.{method.field}.{why}.")
