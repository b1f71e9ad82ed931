"""FSDP2 in a Trainer: what Accelerate is told, what it cannot do, and where the masters come in.

Accelerate shards a model when it prepares it together with its optimizer, whose parameters it then replaces by shards.
`begun` puts before that what `keep_fp32` names, and builds `ShardedMasters` on the shards after it. The masters are
those shards, fp32; forward and backward see half copies that FSDP gathers and frees again. The flat buffers of
`MasterWeights` are not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate.accelerator
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from mptrain.core.errors import UserError
from mptrain.core.patch import replaced
from mptrain.core.pins import warn_untested
from mptrain.precision import Policy
from mptrain.precision.memory import blocks
from mptrain.recipe import LossScale, MixedPrecision
from mptrain.recipe.method import WHOLE
from mptrain.train import launch
from mptrain.train.launch import Launch, Sharding


def on_cpu(accelerator: Accelerator, settings: dict[str, Any] | None) -> bool:
    """Whether FSDP was asked for on CPUs, where Accelerate would train with DDP and say nothing; then it is on."""
    state: Any = accelerator.state
    asked = settings is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if state.distributed_type != DistributedType.MULTI_CPU or not asked:
        return False
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    # both, for each new AcceleratorState takes over what PartialState says
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return True


def launched(accelerator: Accelerator) -> Launch:
    """As Accelerate is told, in a Trainer by its arguments too."""
    kinds: dict[Any, Sharding] = {
        DistributedType.DEEPSPEED: "deepspeed",
        DistributedType.FSDP: "fsdp2" if accelerator.is_fsdp2 else "fsdp1",
    }
    kind = kinds.get(accelerator.distributed_type, "")
    return Launch(accelerator.num_processes, sharding=kind, mixed_precision=accelerator.mixed_precision)


def check(
    accelerator: Accelerator, precision: MixedPrecision, *, compressors: bool, distiller: bool, args: Any
) -> None:
    """Raises UserError for what does not go with the way the Trainer is launched, sharded parameters above all."""
    half = precision.compute != "fp32"
    if not (half or compressors or distiller):
        return
    found = launched(accelerator)
    launch.check(found, precision)
    if found.sharding != "fsdp2":
        return
    if compressors:
        raise UserError(f"compressors: masks and trained tables {WHOLE}")
    full = [flag for flag in ("fp16_full_eval", "bf16_full_eval") if half and getattr(args, flag)]
    if full:
        raise UserError(f"{full[0]}: under FSDP2 a model with precision evaluates as it trains; drop {full[0]}")


def policy_of(precision: MixedPrecision) -> Policy | None:
    if precision.compute == "fp32":
        return None
    scale = LossScale.of(precision.loss_scale, precision.compute)
    return Policy(precision.compute, keep_fp32=precision.keep_fp32, loss_scale=scale)


@contextmanager
def begun(
    accelerator: Accelerator,
    model: nn.Module,
    policy: Policy | None,
    done: Callable[[Any, torch.optim.Optimizer], None],
) -> Iterator[None]:
    """Inside, `accelerator.prepare(model, optimizer)` shards the model, and `done(sharding, optimizer)` follows.

    done: gets what restores the model, and the torch optimizer on shards. A model that is sharded already is left
    alone.
    """
    from torch.distributed.fsdp import FSDPModule

    from mptrain.precision.fully_sharded import Sharding as Shards
    from mptrain.precision.fully_sharded import half_policy

    if isinstance(model, FSDPModule):
        with replaced_on(accelerator, prepare=lambda *given: given):
            yield
        return
    warn_untested(("accelerate",))
    plugin: Any = accelerator.state.fsdp_plugin
    sharding = Shards(model, policy)
    if sharding.kept and plugin.cpu_ram_efficient_loading:
        raise launch.on_one_process("what is kept in fp32 is sharded on all")
    if policy is not None:
        plugin.mixed_precision_policy = half_policy(policy)
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or sorted(
        {type(block).__name__ for block in blocks(model)}
    )
    shard, prepare = accelerate.accelerator.fsdp2_prepare_model, accelerator.prepare

    def sharded(one: Accelerator, given: nn.Module) -> nn.Module:
        mesh = getattr(one, "torch_device_mesh", None)
        options = {
            "mesh": None if mesh is None else mesh[tuple(one.parallelism_config.fsdp_dim_names)],
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload,
        }
        with sharding.begin(**options):
            return shard(one, given)

    def prepared(*given: Any, **options: Any) -> Any:
        if not any(item is model for item in given):
            return prepare(*given, **options)
        with replaced(accelerate.accelerator, fsdp2_prepare_model=sharded):
            found = prepare(*given, **options)
        optimizer = next(item for item in found if isinstance(item, torch.optim.Optimizer))
        done(sharding, getattr(optimizer, "optimizer", optimizer))
        return found

    with replaced_on(accelerator, prepare=prepared):
        yield


@contextmanager
def replaced_on(accelerator: Accelerator, **methods: Callable[..., Any]) -> Iterator[None]:
    """Methods of this one object, for the length of a block."""
    for name, method in methods.items():
        setattr(accelerator, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(accelerator, name)
