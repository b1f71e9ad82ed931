"""A drop-in `transformers.Trainer` with compressors, distillation and half precision with fp32 masters.

With nothing enabled it trains step for step as transformers.Trainer does, but for a loss that transformers
would multiply by accumulation and ranks (see `loss_items.py`). Its checkpoints hold no pickle, and a
truncated one is told from a whole one (see `saving.py`).

With `TrainingArguments(precision=…)` the model's parameters become half when training begins, the
optimizer becomes `MasterWeights` (precision/loop.py), and what is saved are the fp32 masters.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from mptrain.compress.base import TrainingMethod
from mptrain.core.errors import UserError
from mptrain.core.hooks import HOOKS
from mptrain.core.pins import warn_untested
from mptrain.precision import MasterWeights, ShardedMasters
from mptrain.precision.casting import cast
from mptrain.precision.half import computing_in
from mptrain.precision.policy import DTYPES, Compute
from mptrain.recipe import MixedPrecision
from mptrain.train import half, loss_items, sharding
from mptrain.train.arguments import parse, taken
from mptrain.train.distill import Distiller
from mptrain.train.saving import Saving

log = logging.getLogger(__name__)


class Trainer(Saving):
    """`transformers.Trainer` plus `compressors` (already prepared on the model) and a `distiller`.

    With a distiller the loss is averaged per micro-batch, not per token over the whole
    accumulation, so a `compute_loss_func` cannot be given with it. Besides the arguments of transformers.Trainer:

    Arguments:
        compressors: methods that train with the model, each already `prepare`d on it; their order is that of the calls.
        distiller: holds the teacher, and mixes its loss with the model's own.

    - Shapes and dtypes: batches as the model takes them, targets beside the inputs; the loss is a scalar, fp32 under
      `precision`.
    - Units: losses as the model gives them; learning rates and steps count optimizer steps, not micro-steps.
    - Raises UserError for settings that exclude each other, TypeError for a compressor or distiller of another kind.
    - Source: transformers.Trainer, step for step; distillation after Hinton et al. 2015.
    """

    def __init__(
        self, *args: Any, compressors: Sequence[TrainingMethod] = (), distiller: Distiller | None = None, **kwargs: Any
    ) -> None:
        warn_untested(("torch", "transformers"))
        with taken():
            super().__init__(*args, **kwargs)
        _check_kinds(compressors, distiller)
        if distiller is not None and self.compute_loss_func is not None:
            raise UserError("give a distiller or a compute_loss_func, not both: a distiller mixes the model's own loss")
        self.precision: MixedPrecision = parse(getattr(self.args, "precision", None) or "fp32")
        self.compressors = list(compressors)
        self.distiller = distiller
        self._sharding: Any = None
        """restores the model that FSDP2 shards"""
        self._gradients_seen = False
        self._leaf: torch.Tensor | None = None
        """number of items, while it is not known whether the loss is divided by it"""
        self._items_known = False
        self._terms: dict[str, torch.Tensor] = {}
        self._term_count = 0
        sharding.check(
            self.accelerator,
            self.precision,
            compressors=bool(self.compressors),
            distiller=distiller is not None,
            args=self.args,
        )
        if distiller is not None:
            self.model_accepts_loss_kwargs = False
            if self._fully_sharded:
                from mptrain.precision.fully_sharded import shard_blocks

                shard_blocks(distiller.teacher)
            else:
                distiller.teacher.to(self.args.device)
        if self.compressors:
            self.add_callback(_AfterStep(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if sharding.on_cpu(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    # -- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)
        return self._equip()

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        if training:  # the optimizer is there, perhaps from a `create_optimizer` of a subclass
            self._equip()
        return super()._wrap_model(model, training, *args, **kwargs)

    def _equip(self) -> torch.optim.Optimizer:
        """Give the optimizer, whoever made it, what compressors train, and masters."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            if self.compressors or self.precision.compute != "fp32":
                raise UserError(
                    f"create_optimizer of {type(self).__name__} left {self.optimizer!r} in self.optimizer: it has to"
                    " set self.optimizer to a torch.optim optimizer before precision and compressors can act"
                )
            return self.optimizer
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for compressor in self.compressors:
            for group in compressor.parameter_groups():
                if not known & {id(p) for p in group["params"]}:
                    self.optimizer.add_param_group(group)
        if self.precision.compute != "fp32" and self.master_weights is None and not self._fully_sharded:
            self.optimizer = half.build(self.model, self.optimizer, self.precision)
        if self._half:
            self.accelerator.scaler = half.StepScaler(self.master_weights)
        return self.optimizer

    @property
    def _half(self) -> bool:
        """Whether training computes, or will compute, in half."""
        return self.precision.compute != "fp32" or self.master_weights is not None

    def release(self) -> nn.Module:
        """The model with fp32 parameters of its own, as before training; ends training in half precision.

        Under FSDP2 it is whole again, on the CPU of every process, all of which call this.
        """
        if self._sharding is not None:
            self._sharding.restore()
        elif isinstance(self.master_weights, MasterWeights):
            self.master_weights.release()
            for compressor in self.compressors:
                compressor.follow(None)
        else:
            return self.model
        self._sharding = self._sharded_masters = None
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        return self.model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            # an evaluation has marked it as prepared: DDP would not wrap it, and ranks would drift apart
            setattr(self.model, "_is_accelerate_prepared", False)  # noqa: B010
        with self._sharded_by_fsdp2():
            model, loader = super()._prepare_for_training(*args, **kwargs)
        masters = self.master_weights
        if isinstance(masters, MasterWeights):
            wrapped = getattr(model, "_orig_mod", model)  # of torch.compile
            if isinstance(wrapped, DistributedDataParallel):
                masters.attach(wrapped)
            for compressor in self.compressors:
                compressor.follow(masters)
        return model, loader

    def _sharded_by_fsdp2(self) -> contextlib.AbstractContextManager[None]:
        if not self._fully_sharded:
            return contextlib.nullcontext()
        policy = sharding.policy_of(self.precision)

        def done(restores: Any, optimizer: torch.optim.Optimizer) -> None:
            self._sharding = restores
            if policy is not None:
                self._sharded_masters = ShardedMasters(
                    self.model, optimizer, policy.compute, loss_scale=policy.loss_scale
                )
                self.accelerator.scaler.masters = self._sharded_masters

        return sharding.begun(self.accelerator, self.model, policy, done)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # ranges of quantizers are no weights: decay would shrink them to nothing
        return [n for n in super().get_decay_parameter_names(model) if HOOKS not in n]

    # -- one step

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        parts = getattr(self, "current_gradient_accumulation_steps", 1) * self.args.world_size * max(self.args.n_gpu, 1)
        if (
            self._items_known
            or num_items_in_batch is None
            or self.compute_loss_func is not None
            or (self.args.gradient_accumulation_steps == 1 and parts == 1)
        ):
            return super().training_step(model, inputs, num_items_in_batch)
        self._items_known = True
        self._leaf = loss_items.as_leaf(num_items_in_batch, self.args.device)
        asked = self.compute_loss
        self.compute_loss = self._first_loss(asked)  # type: ignore[method-assign]
        try:
            return super().training_step(model, inputs, self._leaf)
        finally:
            del self.compute_loss
            self._leaf = None

    def _first_loss(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """`compute_loss`, perhaps of a subclass, that finds out what its loss is before anything divides it."""

        def first(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            averaged = self.args.average_tokens_across_devices
            self.args.average_tokens_across_devices = False  # a mean must not be multiplied by the ranks
            try:
                loss = compute(model, inputs, *args, **kwargs)
            finally:
                self.args.average_tokens_across_devices = averaged
            if loss_items.depends_on(loss, self._leaf):  # type: ignore[arg-type]
                return loss * max(self.args.world_size, self.args.n_gpu) if averaged else loss
            self.model_accepts_loss_kwargs = False
            log.warning(
                "the loss of %s is the mean of a micro-batch, whatever num_items_in_batch says, so it is divided by the"
                " number of micro-batches here; transformers.Trainer would train with it multiplied by accumulation"
                " and ranks",
                type(self.model).__name__.removeprefix("FSDP"),
            )
            return loss

        return first

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.distiller is None or not model.training:
            loss, outputs = self.task_loss(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        inputs = self.distiller.shown(inputs)
        # in a copy: with label smoothing transformers takes the labels out
        with self.distiller.watching(self.model, inputs):
            task, outputs = self.task_loss(model, {**inputs, **self.distiller.extra_outputs()})
        terms = self.distiller(inputs, outputs, task)
        self._note("task_loss", terms.task)
        self._note("distill_loss", terms.distill)
        self._term_count += 1
        return (terms.total, outputs) if return_outputs else terms.total

    def task_loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> tuple[torch.Tensor, Any]:
        """The loss before distillation, and the outputs; for subclasses."""
        found: Any = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return found

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._gradients_ready()
        if self.master_weights is not None:
            return self.master_weights.clip_grad_norm(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._gradients_ready()
        if self.master_weights is not None:
            return self.master_weights.clip_grad_norm(None) if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, grad_norm)

    def _gradients_ready(self) -> None:
        """Both hooks above come after the gradients are complete and before the optimizer step; act on the first."""
        if self._gradients_seen:
            return
        self._gradients_seen = True
        if not self.compressors:
            return
        masters = self.master_weights
        usable = masters is None or masters.finite()
        if usable and isinstance(masters, MasterWeights):
            masters.unscale_gradients()
        for compressor in self.compressors:
            compressor.gradients(usable)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(*args, **kwargs)
        if not self._half:
            return found
        for dtype in DTYPES.values():  # metrics are computed by the user, in numpy
            found = cast(found, dtype, torch.float32)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Half evaluation leaves the model alone; transformers casts it for good, fp32 weights and buffers included."""
        asked = {flag: getattr(self.args, flag) for flag in ("fp16_full_eval", "bf16_full_eval")}
        if not self._half or self.is_in_train or not any(asked.values()):
            return super().evaluation_loop(*args, **kwargs)
        compute: Compute = "fp16" if asked["fp16_full_eval"] else "bf16"
        masters = self.master_weights
        with contextlib.ExitStack() as stack:
            policy = masters.policy if isinstance(masters, MasterWeights) else None
            if policy is None or policy.compute != compute:
                self._move_model_to_device(self.model, self.args.device)  # put off until now, too
                stack.enter_context(self._in_fp32())
                keep = self.precision.keep_fp32 if policy is None else policy.keep_fp32
                stack.enter_context(computing_in(self.model, keep, compute))
            for flag, value in asked.items():
                stack.callback(setattr, self.args, flag, value)
                setattr(self.args, flag, False)
            return super().evaluation_loop(*args, **kwargs)

    def _updated(self, step: int) -> None:
        self._gradients_seen = False
        for compressor in self.compressors:
            compressor.updated(step)

    # -- log

    def _note(self, name: str, value: torch.Tensor) -> None:
        self._terms[name] = self._terms.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name in list(self._terms):
                mean = self._terms.pop(name) / self._term_count
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            self._term_count = 0
            for compressor in self.compressors:
                logs.update(compressor.logs())
            if self.master_weights is not None:
                logs.update(self.master_weights.logs())
        super().log(logs, start_time)


def _check_kinds(compressors: Sequence[Any], distiller: Any) -> None:
    for compressor in compressors:
        if not hasattr(compressor, "gradients"):
            raise TypeError(
                f"compressors takes objects that act on the model, such as mptrain.compress.prune.fisher.FisherPruner,"
                f" already prepared on it; got {type(compressor).__name__}"
            )
    if distiller is not None and not isinstance(distiller, Distiller):
        raise TypeError(
            f"distiller takes a mptrain.train.distill.Distiller(teacher, settings); got {type(distiller).__name__}"
        )


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._updated(state.global_step)
