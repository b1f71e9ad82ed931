"""A drop-in `transformers.Trainer` with compressors, distillation and half precision with fp32 masters.

With nothing enabled it trains step for step as transformers.Trainer does. Its checkpoints
hold no pickle: optimizer, scheduler and random states are safetensors and JSON, and a
manifest tells a whole checkpoint from a truncated one (see `checkpoint.py`).

With `TrainingArguments(precision=…)` the model's parameters become half when training begins, the
optimizer becomes `MasterWeights` (precision/loop.py), and what is saved are the fp32 masters.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from mptrain.compress.base import TrainingMethod
from mptrain.core.errors import UserError
from mptrain.core.hooks import HOOKS, is_quantized
from mptrain.precision import MasterWeights
from mptrain.precision.casting import cast
from mptrain.precision.half import computing_in
from mptrain.precision.policy import DTYPES, Compute
from mptrain.recipe import MixedPrecision
from mptrain.train import checkpoint, half
from mptrain.train.arguments import parse
from mptrain.train.distill import Distiller

log = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """`transformers.Trainer` plus `compressors` (already prepared on the model) and a `distiller`.

    With a distiller the loss is averaged per micro-batch, not per token over the whole
    accumulation, so a `compute_loss_func` cannot be given with it. Raises UserError and TypeError.
    """

    # transformers calls these optional; while training they are there
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, compressors: Sequence[TrainingMethod] = (), distiller: Distiller | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_kinds(compressors, distiller)
        if distiller is not None and self.compute_loss_func is not None:
            raise UserError("give a distiller or a compute_loss_func, not both: a distiller mixes the model's own loss")
        self.precision: MixedPrecision = parse(getattr(self.args, "precision", None) or "fp32")
        if self.precision.compute != "fp32":
            half.check(self.accelerator)
        self.compressors = list(compressors)
        self.distiller = distiller
        self._gradients_seen = False
        self._terms: dict[str, torch.Tensor] = {}
        self._term_count = 0
        if self.precision.compute != "fp32" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "precision keeps whole fp32 masters and cannot run on sharded parameters: launch with a DDP config"
                " (configs/accelerate-ddp-2gpu.yaml), or use mixed_precision: bf16 of FSDP instead of precision"
            )
        if self.compressors and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "pruning masks act on whole weight matrices and cannot run on sharded parameters:"
                " launch with a DDP config (configs/accelerate-ddp-2gpu.yaml) instead of FSDP or DeepSpeed"
            )
        if distiller is not None:
            self.model_accepts_loss_kwargs = False
            distiller.teacher.to(self.args.device)
        if self.compressors:
            self.add_callback(_AfterStep(self))

    # -- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            for compressor in self.compressors:
                for group in compressor.parameter_groups():
                    optimizer.add_param_group(group)
        if self.precision.compute != "fp32" and self.master_weights is None:
            self.optimizer = optimizer = half.build(self.model, optimizer, self.precision)
        if self.master_weights is not None:
            self.accelerator.scaler = half.StepScaler(self.master_weights)
        return optimizer

    @property
    def master_weights(self) -> MasterWeights | None:
        """The masters and what steps them, once training has begun with a half `precision`."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer if isinstance(optimizer, MasterWeights) else None

    @property
    def _half(self) -> bool:
        """Whether training computes, or will compute, in half."""
        return self.precision.compute != "fp32" or self.master_weights is not None

    def release(self) -> nn.Module:
        """The model with fp32 parameters of its own, as before training; ends training in half precision."""
        if self.master_weights is not None:
            self.master_weights.release()
            for compressor in self.compressors:
                compressor.follow(None)
            self.optimizer = self.lr_scheduler = None
            self.model_wrapped = self.model
        return self.model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self._sharded:
            # an evaluation has marked it as prepared: DDP would not wrap it, and ranks would drift apart
            setattr(self.model, "_is_accelerate_prepared", False)  # noqa: B010
        model, loader = super()._prepare_for_training(*args, **kwargs)
        masters = self.master_weights
        if masters is not None:
            wrapped = getattr(model, "_orig_mod", model)  # of torch.compile
            if isinstance(wrapped, DistributedDataParallel):
                masters.attach(wrapped)
            for compressor in self.compressors:
                compressor.follow(masters)
        return model, loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # ranges of quantizers are no weights: decay would shrink them to nothing
        return [n for n in super().get_decay_parameter_names(model) if HOOKS not in n]

    # -- one step

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.distiller is None or not model.training:
            loss, outputs = self.task_loss(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        # in a copy: with label smoothing transformers takes the labels out
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
        usable = self.master_weights is None or self.master_weights.finite()
        if usable and self.master_weights is not None:
            self.master_weights.unscale_gradients()
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
            if masters is None or masters.policy.compute != compute:
                self._move_model_to_device(self.model, self.args.device)  # put off until now, too
                stack.enter_context(self._in_fp32())
                keep = self.precision.keep_fp32 if masters is None else masters.policy.keep_fp32
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

    # -- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; a checkpoint that is not whole is never resumed from.

        resume_from_checkpoint: True for the newest whole checkpoint in `args.output_dir`, or a folder. Raises
        UserError when there is none, or when the folder given is not whole.
        """
        if resume_from_checkpoint and not self._sharded:
            resume_from_checkpoint = str(checkpoint.usable(resume_from_checkpoint, Path(str(self.args.output_dir))))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _compressed(self) -> bool:
        config = getattr(self.model, "config", None)
        return is_quantized(self.model) or getattr(config, "mptrain_structure", None) is not None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            # a killed attempt; without its manifest it does not count while it is written again
            (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        facts = self.checkpoint_facts()
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not self._sharded:
            checkpoint.seal(folder, step=self.state.global_step, **facts)
        self.accelerator.wait_for_everyone()

    def checkpoint_facts(self) -> dict[str, Any]:
        """More to write into the manifest, for subclasses. Called by every process, written by one."""
        return {}

    def _in_fp32(self, *, write: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model's parameters are fp32: those it has, or the masters."""
        return contextlib.nullcontext() if self.master_weights is None else self.master_weights.exposed(write=write)

    def save_weights(self, path: Path) -> None:
        with self._in_fp32():
            checkpoint.save_weights(self.model, path)

    def load_weights(self, path: Path) -> None:
        with self._in_fp32(write=True):
            checkpoint.load_weights(self.model, path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self._compressed() and not self._sharded:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_weights(folder / checkpoint.WEIGHTS)
        else:
            with _plain_names(self.model), self._in_fp32():
                super()._save(output_dir, state_dict)
            # transformers pickles its arguments here; nothing of ours is ever unpickled
            (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / checkpoint.WEIGHTS).is_file():
            self.load_weights(folder / checkpoint.WEIGHTS)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        weights = Path(str(self.state.best_model_checkpoint)) / checkpoint.WEIGHTS
        if weights.is_file():
            self.load_weights(weights)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            folder = Path(output_dir)
            checkpoint.save_state(self.optimizer.state_dict(), folder / "optimizer")
            checkpoint.save_state(self.lr_scheduler.state_dict(), folder / "scheduler")
            for compressor in self.compressors:
                checkpoint.save_state(compressor.state_dict(), folder / f"compressor-{compressor.name}")

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        folder = Path(checkpoint_folder) if checkpoint_folder else None
        if folder is None or self._sharded or not (folder / "optimizer.json").is_file():
            return super()._load_optimizer_and_scheduler(checkpoint_folder)
        self.optimizer.load_state_dict(checkpoint.load_state(folder / "optimizer"))
        self.lr_scheduler.load_state_dict(checkpoint.load_state(folder / "scheduler"))
        for compressor in self.compressors:
            compressor.load_state_dict(checkpoint.load_state(folder / f"compressor-{compressor.name}"))

    def _save_scaler(self, output_dir: str) -> None:
        if self.master_weights is None:  # with masters the loss scale is part of the optimizer's state
            super()._save_scaler(output_dir)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.master_weights is None:
            super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        checkpoint.save_state(checkpoint.rng_state(), Path(output_dir) / f"rng-{self.args.process_index}")

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        path = Path(checkpoint_folder) / f"rng-{self.args.process_index}"
        if path.with_suffix(".json").is_file():
            checkpoint.set_rng_state(checkpoint.load_state(path))
        else:
            super()._load_rng_state(checkpoint_folder)


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


@contextlib.contextmanager
def _plain_names(model: nn.Module) -> Iterator[None]:
    """Save under the names the model has in memory.

    transformers 5 writes back the names a file was loaded with (`LayerNorm.gamma`), which
    resuming does not find again.
    """
    missing = object()
    before = getattr(model, "_weight_conversions", missing)
    if before is missing:
        yield
        return
    setattr(model, "_weight_conversions", [])  # noqa: B010
    try:
        yield
    finally:
        setattr(model, "_weight_conversions", before)  # noqa: B010
