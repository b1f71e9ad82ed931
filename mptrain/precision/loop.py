"""`MasterWeights`: mixed precision for a training loop that is written by hand.

    mw = MasterWeights(model, optimizer, dtype="bf16")     # after the optimizer, before DDP
    for batch in data:
        loss = model(**batch).loss
        mw.backward(loss)                                  # was loss.backward()
        if mw.step():                                      # was optimizer.step(); optimizer.zero_grad()
            scheduler.step()                               # a skipped step does not move the schedule

One step is: gradients are complete -> the ranks agree whether all are finite -> clip, unscale, update
masters and moments and write the half weights in one pass -> gradients are freed. A step with a
non-finite gradient changes nothing but the loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mptrain.core.errors import UserError
from mptrain.precision import accumulate
from mptrain.precision.kernels import KernelChoice
from mptrain.precision.optimizer import MasterOptimizer
from mptrain.precision.policy import Compute, LossScale, Master, Moments, Policy
from mptrain.precision.scaler import LossScaler
from mptrain.precision.step import Run, checked_max_norm, clip_factor, collect
from mptrain.precision.watchdog import Watchdog


class MasterWeights(MasterOptimizer):
    """Makes `model` compute in half precision while `optimizer` updates fp32 masters.

    It is a `torch.optim.Optimizer` itself, so schedulers, Accelerate and the Trainer take it for one.

    Arguments:
        model: on its device, not yet wrapped in DDP. Its parameters become half in place.
        optimizer: any torch.optim optimizer built on the model's parameters. Adam, AdamW and SGD step in
            one pass; others step on the masters, which takes 4 more bytes a parameter for fp32 gradients.
        dtype: "bf16" or "fp16".
        master: "fp32", or "split" (bf16 only): 2 bytes a parameter less and nothing to sync.
        keep_fp32: parameters whose modules compute in fp32: substrings of names, "re:REGEX", or "norms".
        loss_scale: "dynamic", a number, or a LossScale; default: dynamic for fp16, 1 for bf16.
        max_grad_norm: clip the norm of all gradients to this in every step; in place of torch's clip_grad_norm_.
        reduce: dtype in which an `attach`ed DDP sums gradients over ranks, "fp32" or "compute".
        process_group: ranks that agree on skipping a step; default: all.
        kernel: "auto" (compiled where possible), "native" or "torch".
        moments: "fp32", or "int8" (split masters and Adam or AdamW only): 8 bits each for exp_avg and the root of
            exp_avg_sq, 6 bytes a parameter less. What is kept in fp32 has fp32 moments.

    - Shapes and dtypes: parameters of any shape, fp32, fp16 or bf16, become views of one flat buffer of `dtype`;
      masters and moments are fp32, of the same shapes (moments "int8": codes); the loss is a scalar.
    - Units: norms are those of gradients without the loss scale; AdamW takes 16 bytes a parameter, `split` 14, with
      moments "int8" 8.03.
    - Raises UserError for wrong arguments, ModelError when a pattern matches nothing or a dtype cannot be trained.
    - Source: Micikevicius et al. 2018, Mixed Precision Training, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: Compute = "bf16",
        master: Master = "fp32",
        *,
        keep_fp32: Sequence[str] = (),
        loss_scale: LossScale | Literal["dynamic"] | float | None = None,
        max_grad_norm: float | None = None,
        reduce: Literal["fp32", "compute"] = "fp32",
        process_group: dist.ProcessGroup | None = None,
        kernel: KernelChoice = "auto",
        moments: Moments = "fp32",
    ) -> None:
        policy = Policy(dtype, master, reduce, keep_fp32, LossScale.of(loss_scale, dtype), moments)
        self.scaler = LossScaler(policy.loss_scale)
        self.max_grad_norm = checked_max_norm(max_grad_norm)
        self.grad_norm = 0.0
        """of the last step's gradients, unscaled, before clipping"""
        self._group = process_group
        self._clip = max_grad_norm
        self._measured: tuple[list[Run], bool] | None = None
        self._unscaled = False
        self._scaled = False
        self._alike = False
        """masters were found equal on all ranks, or made so"""
        self._left: tuple[nn.Parameter, int] | None = None
        """a parameter whose gradient `backward` left, and the version of that tensor"""
        self._last_loss: Tensor | None = None
        super().__init__(model, optimizer, policy, kernel)
        self._watchdog = Watchdog(self.model, self.scaler, dtype, "keep_fp32=[...]")

    # -- gradients

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Tell which DDP wraps the model: needed to accumulate gradients over micro-steps with several ranks.

        As DDP does with the model, all ranks take the masters of rank 0. Gradients are then summed over ranks in the
        policy's `reduce` dtype. Use DDP's `no_sync` as always. Raises UserError for anything but a DDP.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise UserError(f"attach() takes the DistributedDataParallel around the model, got {type(ddp).__name__}")
        if ddp is self._attached:
            return
        wire = torch.float32 if self.policy.reduce == "fp32" else self.policy.dtype
        accumulate.reduce_in_fp32(ddp, self.masters.by_id, wire)
        self._attached = ddp
        self._settle()
        for flat in self.flats:
            for bits in flat.bits:
                dist.broadcast(bits.view(torch.uint8), group=ddp.process_group, group_src=0)
        self.sync()
        self._alike = True

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scaled backward of a scalar loss; gradients of earlier micro-steps are summed in fp32."""
        self.scale(loss).backward(**kwargs)
        half = (e.parameter for flat in self.flats if flat.dtype != torch.float32 for e in flat.entries)
        self._left = next(((p, p.grad._version) for p in half if p.grad is not None), None)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, a scalar of any float dtype, times the loss scale, in fp32: to call backward on.

        Raises UserError where gradients are summed over micro-steps on several ranks without `attach`.
        """
        self._settle()
        self._measured = None
        self._scaled = True
        if not self._alike and self._ranks() > 1:
            self._compare_ranks()
        for flat in self.flats:
            if flat.dtype != torch.float32 and any(e.parameter.grad is not None for e in flat.entries):
                if self._ranks() > 1 and not self._attached:
                    raise UserError(
                        "gradients are accumulated over micro-steps on several ranks: call attach(ddp_model) once"
                        " after wrapping, so that the fp32 sums are reduced over the ranks"
                    )
                accumulate.fold(flat)
        if loss.dtype == torch.float16:
            self.scaler.limit(2.0**15)  # the gradient of the loss itself is the scale, and 65504 is the top of fp16
        self._last_loss = loss.detach()
        return loss.float() * self.scaler.scale

    @torch.no_grad()
    def unscale_gradients(self) -> None:
        """Move the complete gradients to fp32 and divide them by the loss scale.

        For code that reads or edits gradients before the step, through `gradient`. Costs a pass.
        """
        if self._unscaled:
            return
        for flat in self.flats:
            if flat.dtype != torch.float32:
                accumulate.fold(flat)
        accumulate.scale(self.flats, 1.0 / self.scaler.scale)
        self._unscaled = True
        self._measured = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """fp32 gradient of a model parameter for the coming step, unscaled.

        Edits in place count; make them before `clip_grad_norm`.
        """
        self.unscale_gradients()
        self._measured = None
        flat, entry = self.masters.by_id[id(parameter)]
        if flat.dtype == torch.float32:
            return parameter.grad
        return flat.view(flat.gradients(), entry) if entry.accumulated else None

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip this step's gradients to `max_norm`; returns their norm, unscaled and before clipping.

        No gradient is touched: the factor goes into the update.
        """
        self._clip = checked_max_norm(max_norm)
        self.finite()
        return torch.tensor(self.grad_norm)

    def finite(self) -> bool:
        """Whether this step's gradients are finite on all ranks. Measured once a step, with one host sync."""
        if self._measured is None:
            self._check_gradients()
            runs = [run for flat in self.flats for run in collect(flat)]
            norm = math.sqrt(self._sum_of_squares(runs))
            self.grad_norm = norm / (1.0 if self._unscaled else self.scaler.scale)
            self._measured = runs, self._all_ranks(math.isfinite(norm))
        return self._measured[1]

    def _check_gradients(self) -> None:
        """Mistakes of a loop that would train wrongly without a word."""
        if self._unscaled:
            return
        found = (e.parameter.grad is not None for flat in self.flats for e in flat.entries)
        if not self._scaled and self.scaler.scale != 1.0 and any(found):
            raise UserError(
                f"gradients were not multiplied by the loss scale ({self.scaler.scale:g}), by which this step divides"
                " them: call backward(loss) of the MasterWeights object instead of loss.backward()"
            )
        if self._left is None or self._left[0].grad is None or self._left[0].grad._version == self._left[1]:
            return
        if self.scaler.scale != 1.0 or any(e.accumulated for flat in self.flats for e in flat.entries):
            raise UserError(
                "gradients were changed between backward and step, while they are half, multiplied by the loss scale"
                " and without those of earlier micro-steps: instead of torch.nn.utils.clip_grad_norm_ give"
                " max_grad_norm=… or call clip_grad_norm(…) of the MasterWeights object; to edit them, edit what its"
                " gradient(p) returns"
            )

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _compare_ranks(self) -> None:
        """Raises UserError, on all ranks, when their masters differ: after a step their weights would, too."""
        sums = torch.stack([bits.sum(dtype=torch.int64) for flat in self.flats for bits in flat.bits])
        both = torch.stack([sums, -sums])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        if not torch.equal(both[0], -both[1]):
            raise UserError(
                "the ranks started from different weights; DDP has made the half weights equal, the masters still"
                " differ: call attach(ddp_model) once after wrapping, which takes those of rank 0, or seed all ranks"
                " alike before the model is made"
            )
        self._alike = True

    def _all_ranks(self, finite: bool) -> bool:
        if self._ranks() == 1:
            return finite
        bad = torch.tensor(0.0 if finite else 1.0, device=self.flats[0].device)
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self._group)
        return bad.item() == 0

    # -- a step

    def step(self, closure: None = None) -> bool:  # type: ignore[override]
        """Update the weights, or skip when a gradient is not finite; either way gradients are dropped.

        Returns whether the weights were updated. closure: None. Raises UserError for a closure, TrainingError with a
        diagnosis when the loss scale is exhausted.
        """
        if closure is not None:
            raise UserError("step() takes no closure: optimizers that evaluate the loss themselves are not supported")
        finite = self.finite()
        if finite:
            runs, _ = self._measured or ([], True)
            scale = 1.0 if self._unscaled else self.scaler.scale
            self._update(runs, clip_factor(self.grad_norm, self._clip) / scale)
        rank = dist.get_rank() if self._ranks() > 1 else None
        self._watchdog.stepped(finite, self._last_loss, self._named_gradients, rank)
        self.zero_grad()
        self._scaled = False
        return finite

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        self._measured = None
        self._unscaled = False
        self._left = None
        self._clip = self.max_grad_norm

    def _named_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for flat in self.flats:
            for e in flat.entries:
                yield e.name, flat.view(flat.gradients(), e) if e.accumulated else e.parameter.grad

    # -- reports and state

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
        """All a bit-identical resume needs but buffers and frozen weights, which are the model's: tensors, numbers and
        strings."""
        return {**super().state_dict(), "loss_scale": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["loss_scale"])
        self.zero_grad()

    def load_plain_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_plain_state_dict(state_dict)
        self.zero_grad()
