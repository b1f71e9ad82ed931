"""What is refused for the way processes are launched, before any training."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from kit import tiny
from torch import nn

from mptrain.core.errors import UserError
from mptrain.flow import many_processes
from mptrain.precision import memory
from mptrain.recipe import MixedPrecision, Recipe
from mptrain.train import sharding
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


def accelerated(sharding="", mixed_precision="no", **_):
    """What a Trainer reads of its Accelerator when it is launched so."""
    kinds = {"deepspeed": DistributedType.DEEPSPEED, "": DistributedType.MULTI_GPU}
    kind = kinds.get(sharding, DistributedType.FSDP)
    told = {"is_fsdp2": sharding == "fsdp2", "num_processes": 2, "mixed_precision": mixed_precision}
    return SimpleNamespace(distributed_type=kind, **told)


@pytest.mark.parametrize(
    ("launch", "precision"),
    [
        ({"sharding": "deepspeed"}, "bf16-master"),
        ({"sharding": "fsdp1"}, "bf16-master"),
        (FSDP2, "bf16-split"),
        (FSDP2, "bf16-split-int8"),
        (FSDP2 | {"mixed_precision": "fp16"}, "fp16-master"),
        ({"mixed_precision": "bf16"}, "bf16-master"),
    ],
)
def test_a_trainer_refuses_in_the_same_words(tmp_path, launch, precision):
    with pytest.raises(UserError) as of_recipe:
        many_processes.check(recipe(tmp_path, precision=precision), Launch(2, **launch), lambda stage: 100)
    parsed = MixedPrecision.model_validate(precision)
    with pytest.raises(UserError) as of_trainer:
        sharding.check(accelerated(**launch), parsed, compressors=False, distiller=False, args=None)
    assert str(of_trainer.value) == str(of_recipe.value)


def test_what_acts_on_whole_matrices_is_refused_in_the_same_words(tmp_path):
    with pytest.raises(UserError) as of_recipe:
        many_processes.check(recipe(tmp_path, prune={}), Launch(2, **FSDP2), lambda stage: 100)
    fp32 = MixedPrecision(compute="fp32")
    with pytest.raises(UserError) as of_trainer:
        sharding.check(accelerated(**FSDP2), fp32, compressors=True, distiller=False, args=None)
    shared = "act on whole weight matrices, and FSDP2 shards them: launch with DDP (mptrain copy accelerate-ddp-2gpu)"
    assert shared in str(of_recipe.value) and str(of_trainer.value).endswith(shared)


def test_a_prediction_of_memory_refuses_in_the_same_words():
    with pytest.raises(UserError) as of_memory:
        memory.predict_sharded(nn.Linear(2, 2), "bf16-split", 2)
    assert str(of_memory.value) == MixedPrecision.model_validate("bf16-split").why_not_sharded()


def test_a_trainer_of_transformers_kind_is_left_alone():
    """Without precision, compressors and distillation it is transformers' own, under FSDP1 and DeepSpeed too."""
    for kind in ("deepspeed", "fsdp1", "fsdp2", ""):
        fp32 = MixedPrecision(compute="fp32")
        sharding.check(accelerated(kind, "bf16"), fp32, compressors=False, distiller=False, args=None)
