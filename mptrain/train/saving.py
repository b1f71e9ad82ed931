"""Checkpoints of a Trainer: no pickle, whole or not used, resumed bit for bit.

Weights are fp32 (the masters, with `precision`), under the names the model has in memory. Optimizer, scheduler and
random states are safetensors and JSON (checkpoint.py). transformers' own Trainer would look for `optimizer.pt`, find
none and start a fresh optimizer without a word, so a text lies there that makes it stop; `for_transformers` replaces
it. Theirs are resumed here, with `precision` too: their weights become the masters, their moments go on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.trainer_callback import TrainerState

from mptrain.compress.base import TrainingMethod
from mptrain.core.hooks import is_quantized
from mptrain.precision import MasterWeights, ShardedMasters, moments8
from mptrain.precision.fully_sharded import gathered
from mptrain.train import checkpoint, shards


class Saving(transformers.Trainer):
    """What of a Trainer concerns checkpoints."""

    # transformers calls these optional; while training they are there
    model: Any
    optimizer: Any
    lr_scheduler: Any
    compressors: Sequence[TrainingMethod]
    _sharded_masters: ShardedMasters | None = None

    @property
    def master_weights(self) -> MasterWeights | ShardedMasters | None:
        """The masters and what steps them, once training has begun with a half `precision`."""
        optimizer = self._torch_optimizer
        return optimizer if isinstance(optimizer, MasterWeights) else self._sharded_masters

    @property
    def _torch_optimizer(self) -> Any:
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; a checkpoint that is not whole is never resumed from.

        resume_from_checkpoint: True for the newest whole checkpoint in `args.output_dir`, or a folder. Raises
        UserError when there is none, or when the folder given is not whole.
        """
        if resume_from_checkpoint and not self._sharded:
            resume_from_checkpoint = str(checkpoint.usable(resume_from_checkpoint, Path(str(self.args.output_dir))))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps: int, steps_per_pass: int, passes: int, resume: Any, trial: Any) -> Any:
        """Where in the data to go on. Of data without a length transformers skips all batches in the first pass."""
        where = super()._init_training_state(max_steps, steps_per_pass, passes, resume, trial)
        if resume is None or passes != sys.maxsize or self.args.ignore_data_skip:
            return where
        saved = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
        # the epoch counts passes, and batches of this one in shares of all that max_steps would take
        epoch, share = divmod(float(saved.epoch or 0.0) + 1e-9, 1.0)
        return int(epoch), round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    @property
    def _fully_sharded(self) -> bool:
        """Whether FSDP2 shards the model; its checkpoints are shards.py."""
        return self.is_fsdp_enabled and self.accelerator.is_fsdp2

    @property
    def _sharded(self) -> bool:
        """Whether FSDP1 or DeepSpeed does; their checkpoints are those of transformers."""
        return (self.is_fsdp_enabled and not self._fully_sharded) or self.is_deepspeed_enabled

    def _compressed(self) -> bool:
        config = getattr(self.model, "config", None)
        return is_quantized(self.model) or getattr(config, "mptrain_structure", None) is not None

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Below batches that are skipped on a resume and shared out over ranks accelerate's set_epoch finds no sampler,
        which then repeats the order of the first epoch. So it is told before batches are skipped."""
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

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
        """Whole and fp32. Called by every process, written by one."""
        if self._fully_sharded:
            tensors = gathered(self.model, self.args.should_save)
            if self.args.should_save:
                checkpoint.save_tensors(tensors, path)
        elif self.args.should_save:
            with self._in_fp32():
                checkpoint.save_weights(self.model, path)

    def load_weights(self, path: Path) -> None:
        if self._fully_sharded:
            return shards.load_whole(self.model, path)
        with self._in_fp32(write=True):
            checkpoint.load_weights(self.model, path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; under FSDP2 whole and fp32 whatever `fsdp_state_dict_type` says, by all processes."""
        if not self._fully_sharded:
            return super().save_model(output_dir, _internal_call)
        if _internal_call and not self.args.save_only_model:
            return  # of a checkpoint: its shards hold the weights
        state = gathered(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self._compressed() and not self._sharded:
            folder.mkdir(parents=True, exist_ok=True)
            if state_dict is None:
                self.save_weights(folder / checkpoint.WEIGHTS)
            else:
                checkpoint.save_tensors(state_dict, folder / checkpoint.WEIGHTS)
        else:
            with _plain_names(self.model), self._in_fp32():
                if state_dict is None and not hasattr(self.accelerator.unwrap_model(self.model), "save_pretrained"):
                    state_dict = checkpoint.model_tensors(self.model)  # safetensors knows no second names
                super()._save(output_dir, state_dict)
            # transformers pickles its arguments here; nothing of ours is ever unpickled
            (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._fully_sharded:
            shards.load_model(self.model, folder)
        elif shards.are_in(folder):
            with self._in_fp32(write=True):
                checkpoint.load_tensors(self.model, shards.whole(folder)[0], folder)
        elif (folder / checkpoint.WEIGHTS).is_file():
            self.load_weights(folder / checkpoint.WEIGHTS)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = checkpoint.second_names(self.model)
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _load_best_model(self) -> None:
        weights = Path(str(self.state.best_model_checkpoint)) / checkpoint.WEIGHTS
        if self._fully_sharded:
            shards.load_model(self.model, weights.parent)
        elif weights.is_file():
            self.load_weights(weights)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        if self._fully_sharded:
            scale = None if self.master_weights is None else self.master_weights.state_dict()
            shards.save(self.model, self._torch_optimizer, folder, scale, writes=self.args.should_save)
        elif self.args.should_save:
            checkpoint.save_state(self.optimizer.state_dict(), folder / "optimizer")
        if self.args.should_save:
            checkpoint.save_state(self.lr_scheduler.state_dict(), folder / "scheduler")
            for compressor in self.compressors:
                checkpoint.save_state(compressor.state_dict(), folder / f"compressor-{compressor.name}")
            checkpoint.stop_transformers(folder)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        folder = Path(checkpoint_folder) if checkpoint_folder else None
        masters = self.master_weights
        if folder is None or self._sharded:
            return super()._load_optimizer_and_scheduler(checkpoint_folder)
        if self._fully_sharded:
            scale = shards.load_optimizer(self.model, self._torch_optimizer, folder)
            if masters is not None and scale is not None:
                masters.load_state_dict(scale)
            self.lr_scheduler.load_state_dict(checkpoint.load_state(folder / "scheduler"))
            return None
        if shards.are_in(folder):
            state = shards.whole(folder)[1]
            if isinstance(masters, MasterWeights):
                masters.load_plain_state_dict(state)
                masters.scaler.load_state_dict(state["loss_scale"] or masters.scaler.state_dict())
            else:
                self.optimizer.load_state_dict({k: v for k, v in state.items() if k != "loss_scale"})
            self.lr_scheduler.load_state_dict(checkpoint.load_state(folder / "scheduler"))
            return None
        if not (folder / "optimizer.json").is_file():  # of transformers' own Trainer
            if not isinstance(masters, MasterWeights) or not (folder / "optimizer.pt").is_file():
                return super()._load_optimizer_and_scheduler(checkpoint_folder)
            masters.load_plain_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
            return None
        state = checkpoint.load_state(folder / "optimizer")
        if isinstance(masters, MasterWeights) and "masters" not in state:  # of fp32: the weights are the masters
            masters.load_plain_state_dict(state)
        else:
            self.optimizer.load_state_dict(state if masters is not None else moments8.plain(state))
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
