"""Half precision for parameters that FSDP2 shards.

There the masters exist already: `fully_shard` keeps fp32 shards and gathers half copies of them, a layer at a
time, when its MixedPrecisionPolicy says so. What it lacks is the rest of a half step:

    scaled backward -> sum of squares of the local shards, summed over the ranks: norm and "all finite" in one
    number, so that all ranks skip or none does -> clip and unscale in one factor -> the optimizer on fp32 shards

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks: fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    mw = ShardedMasters(model, optimizer, "bf16")     # then as MasterWeights: mw.backward(loss), mw.step()

With reduce_dtype fp32 gradients are summed over ranks and over micro-steps in fp32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mptrain.core.errors import ModelError, UserError
from mptrain.precision.policy import DTYPES, Compute, LossScale
from mptrain.precision.scaler import LossScaler
from mptrain.precision.step import checked_max_norm, clip_factor
from mptrain.precision.watchdog import Watchdog


class ShardedMasters:
    """Loss scale, norm, clipping and skipped steps around `optimizer`, whose parameters are fp32 DTensors.

    Arguments:
        model: after `fully_shard`, with the MixedPrecisionPolicy of `dtype`.
        optimizer: any torch.optim optimizer built on the sharded parameters.
        dtype, loss_scale, max_grad_norm: as for `MasterWeights`; torch's clip_grad_norm_ would clip scaled gradients.
        process_group: ranks that agree on skipping a step; default: all.

    Raises ModelError when a trained parameter is not an fp32 DTensor: a half shard would be no master.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: Compute = "bf16",
        *,
        loss_scale: LossScale | Literal["dynamic"] | float | None = None,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"the compute dtype must be 'fp16' or 'bf16', got {dtype!r}")
        self.optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        for p in self._parameters():
            if not isinstance(p, DTensor) or p.dtype != torch.float32:
                kind = f"sharded in {p.dtype}" if isinstance(p, DTensor) else "not sharded"
                raise ModelError(
                    f"{self._names.get(id(p), 'a parameter')} is {kind}; masters are fp32 shards: build the model in"
                    " fp32, call fully_shard with a MixedPrecisionPolicy, then make the optimizer"
                )
        self.scaler = LossScaler(LossScale.of(loss_scale, dtype))
        self.max_grad_norm = checked_max_norm(max_grad_norm)
        self.grad_norm = 0.0
        """of the last step's gradients, unscaled, before clipping"""
        self._group = process_group
        self._watchdog = Watchdog(model, self.scaler, dtype, "a policy of their own in fully_shard")
        self._last_loss: Tensor | None = None
        self._scaled = False
        self._clip = max_grad_norm
        self._finite: bool | None = None
        """of this step's gradients, once they were looked at"""

    def _parameters(self) -> Iterator[Any]:
        """DTensors."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scaled backward of a scalar loss. Between micro-steps use FSDP2's set_requires_gradient_sync as always."""
        self.scale(loss).backward(**kwargs)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, a scalar of any float dtype, times the loss scale, in fp32: to call backward on."""
        self._last_loss = loss.detach()
        if loss.dtype == torch.float16:
            self.scaler.limit(2.0**15)
        self._scaled, self._finite = True, None
        return loss.float() * self.scaler.scale

    def finite(self) -> bool:
        """Whether this step's gradients are finite on all ranks. Measured once a step, with one host sync."""
        if self._finite is None:
            if not self._scaled and self.scaler.scale != 1.0 and any(p.grad is not None for p in self._parameters()):
                raise UserError(
                    f"gradients were not multiplied by the loss scale ({self.scaler.scale:g}), by which this step"
                    " divides them: call backward(loss) of the ShardedMasters object instead of loss.backward()"
                )
            norm = math.sqrt(self._sum_of_squares())
            self.grad_norm = norm / self.scaler.scale
            self._finite = math.isfinite(norm)
        return self._finite

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip this step's gradients to `max_norm`; returns their norm over all shards, unscaled and before clipping.

        No gradient is touched: the factor goes into the update.
        """
        self._clip = checked_max_norm(max_norm)
        self.finite()
        return torch.tensor(self.grad_norm)

    @torch.no_grad()
    def step(self) -> bool:
        """Update the shards, or skip on all ranks when any gradient is not finite; gradients are dropped.

        Returns whether the weights were updated. Raises TrainingError with a diagnosis when the loss scale is
        exhausted.
        """
        finite = self.finite()
        if finite:
            factor = clip_factor(self.grad_norm, self._clip) / self.scaler.scale
            shards = [p.grad.to_local() for p in self._parameters() if p.grad is not None]
            torch._foreach_mul_(shards, factor)
            self.optimizer.step()
        self._watchdog.stepped(finite, self._last_loss, self._named_gradients, dist.get_rank(self._group))
        self.zero_grad()
        return finite

    def _sum_of_squares(self) -> float:
        """Over all shards of all ranks, in float64; with one host sync."""
        total = torch.zeros((), dtype=torch.float64)
        for p in self._parameters():
            if p.grad is None:
                continue
            copies = math.prod(p.grad.device_mesh.size(d) for d, x in enumerate(p.grad.placements) if x.is_replicate())
            norm = torch.linalg.vector_norm(p.grad.to_local(), dtype=torch.float64)
            total = total.to(norm.device) + norm.square() / copies
        dist.all_reduce(total, group=self._group)
        return total.item()

    def _named_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for p in self._parameters():
            yield self._names.get(id(p), "?"), None if p.grad is None else p.grad.to_local()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._scaled, self._finite, self._clip = False, None, self.max_grad_norm

    def exposed(self, *, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """As of MasterWeights; here the model's parameters are the masters, outside too."""
        return contextlib.nullcontext(self._watchdog.model)

    @property
    def loss_scale(self) -> float:
        return self.scaler.scale

    @property
    def skipped_steps(self) -> int:
        return self.scaler.skipped_steps

    def logs(self) -> dict[str, float]:
        """Scalars for the training log."""
        return self.scaler.logs(self.grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale; weights and moments are saved as for any FSDP2 model, with torch.distributed.checkpoint."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.scaler.load_state_dict(dict(state_dict))
