"""What is refused for the way processes are launched, before any training."""

import pytest
from kit import tiny

from mptrain.core.errors import UserError
from mptrain.flow import many_processes
from mptrain.recipe import Recipe
from mptrain.train.launch import Launch

FSDP2 = {"sharding": "fsdp2"}


def recipe(tmp_path, *, prune=None, **changes):
    described = tiny.jpqd(tmp_path) | changes
    if prune is None:
        del described["stages"][1]["prune"]
    else:
        described["stages"][1]["prune"] |= prune
    return Recipe.model_validate(described)


@pytest.mark.parametrize(
    ("launch", "changes", "says"),
    [
        ({"sharding": "deepspeed"}, {}, "does not train under DeepSpeed"),
        ({"sharding": "fsdp1"}, {}, "fsdp_version: 2"),
        (FSDP2, {"prune": {}}, r"stages\.jpqd\.prune\.schedule: masks act on whole weight matrices"),
        (FSDP2, {"precision": "bf16-split"}, r"precision\.master: split"),
        (FSDP2, {"precision": "bf16-split-int8"}, r"use fp32 \(bf16-master\) and drop moments: int8"),
        (FSDP2 | {"one_loads": True}, {}, "fsdp_cpu_ram_efficient_loading"),
        (FSDP2 | {"mixed_precision": "bf16"}, {"precision": "bf16-master"}, "exclude each other"),
    ],
)
def test_refused(tmp_path, launch, changes, says):
    with pytest.raises(UserError, match=says):
        many_processes.check(recipe(tmp_path, **changes), Launch(2, **launch), lambda stage: 100)


@pytest.mark.parametrize(
    ("launch", "changes"),
    [
        (FSDP2, {"precision": "fp16-master"}),
        (FSDP2, {"prune": {"schedule": {"end": 0}}}),
        ({}, {"prune": {}, "precision": "bf16-master"}),
    ],
)
def test_taken(tmp_path, launch, changes):
    many_processes.check(recipe(tmp_path, **changes), Launch(2, **launch), lambda stage: 100)
