"""One phase of a stage: one Trainer, one optimizer, one series of checkpoints.

Everything random in a phase starts from a seed made of the recipe's seed, the stage and
the phase, and everything else from the folder the phase before left. So a run that was
killed and resumed, and one that was not, do the same arithmetic.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import set_seed

from mptrain.compress.base import TrainingMethod
from mptrain.core.errors import TrainingError
from mptrain.data.load import Task
from mptrain.data.tasks.metrics import Score
from mptrain.recipe import MixedPrecision, Train
from mptrain.recipe.plan import Phase
from mptrain.train import checkpoint
from mptrain.train.arguments import TrainingArguments, of_recipe
from mptrain.train.distill import Distiller
from mptrain.train.history import history_rows
from mptrain.train.interrupt import Checkpoints
from mptrain.train.peaks import Peaks
from mptrain.train.progress import TrainingProgress
from mptrain.train.sampler import LengthGroupedSampler
from mptrain.train.trainer import Trainer
from mptrain.train.untouched import Untouched

log = logging.getLogger(__name__)

BEST = "best.safetensors"


def phase_seed(seed: int, phase: Phase) -> int:
    return zlib.crc32(f"{seed}/{phase.stage}/{phase.index}".encode())


def learning_rate(step: int, *, total: int, warmup: int, schedule: str) -> float:
    """Factor on the learning rate at a step of the stage; 1 at the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


class PhaseTrainer(Trainer):
    """Trains steps [phase.start, phase.end) of a stage and evaluates on the validation split."""

    def __init__(
        self,
        model: nn.Module,
        *,
        phase: Phase,
        train: Train,
        data: Task,
        folder: Path,
        seed: int,
        stop: Callable[[], bool],
        precision: MixedPrecision,
        compressors: Sequence[TrainingMethod] = (),
        distiller: Distiller | None = None,
        peaks: Peaks | None = None,
    ) -> None:
        self.peaks = peaks
        self._examples = examples = data.taught(distilled=distiller is not None)
        self.phase, self.settings, self.task, self.folder = phase, train, data, folder
        self.best: dict[str, Any] | None = None
        self._bad_epochs = 0
        self._progress = TrainingProgress(phase)
        self.before_s = 0.0
        self._unlogged: dict[str, Any] | None = None
        self._started = time.monotonic()
        on_cpu = not torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=phase.steps,
            optim="adamw_torch_fused",
            seed=seed,
            data_seed=seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            dataloader_drop_last=len(examples) >= train.batch_size * PartialState().num_processes,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            logging_strategy="steps",
            logging_first_step=True,
            logging_nan_inf_filter=precision.compute != "fp32",  # there a skipped step is no failure
            eval_strategy="epoch",
            save_strategy="no",
            save_total_limit=2,
            run_name=f"{phase.stage}-{phase.name}",
            disable_tqdm=None,
            precision=precision.model_dump(mode="json"),
            **of_recipe(train),
        )
        super().__init__(
            model,
            arguments,
            data_collator=data.collate,
            train_dataset=examples,
            eval_dataset=data.validation,
            compressors=compressors,
            distiller=distiller,
        )
        self.add_callback(Untouched(f"{phase.stage}/{phase.name}"))
        self.add_callback(Checkpoints(train.checkpoint_steps, stop, self.restore_unlogged, peaks))
        self.model_accepts_loss_kwargs = False
        self._quiet()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.close()

    def _quiet(self) -> None:
        from transformers import PrinterCallback, ProgressCallback

        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
        if self.is_world_process_zero():
            self.add_callback(self._progress)

    # -- order of the data and learning rate

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return LengthGroupedSampler(
            self._examples.lengths,
            self.settings.batch_size,
            self.args.seed,
            group=self.settings.group_by_length,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        factor = partial(
            learning_rate,
            total=self.phase.total,
            warmup=round(self.settings.warmup * self.phase.total),
            schedule=self.settings.schedule,
        )
        start = self.phase.start
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: factor(start + step)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- checks and validation

    def task_loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> tuple[torch.Tensor, Any]:
        if not self.task.computes_loss():
            loss, outputs = super().task_loss(model, inputs, num_items_in_batch)
            # the mean over the examples that have targets becomes one over all, and nothing where none has
            share = self.task.labelled_share(inputs)
            return (loss if share == 1 else loss * share if share else loss.new_zeros(())), outputs
        outputs = model(**self.task.without_targets(inputs))
        found = self.task.loss(outputs, inputs)
        assert found is not None
        return found, outputs

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.peaks is not None:
            self.peaks.step(self.task.without_targets(inputs))
        # with masters such a step is skipped, and repeated ones end with the diagnosis of MasterWeights
        if self.master_weights is None and not torch.isfinite(loss):
            raise TrainingError(self._diagnosis(float(loss)))
        return loss

    def _diagnosis(self, loss: float) -> str:
        own = ((n, getattr(p, "to_local", p.detach)()) for n, p in self.model.named_parameters())  # shards
        broken = [n for n, p in own if not torch.isfinite(p).all()]
        if broken:
            cause = f"{len(broken)} parameters are no longer finite (first: {broken[0]})"
        else:
            cause = "all parameters are finite, so this batch or its forward pass is the cause"
        return (
            f"The loss became {loss} in {self.where()}; {cause}. Lower stages.{self.phase.stage}.train.lr"
            f" (now {self.settings.lr:g}), keep max_grad_norm at 1 (now {self.settings.max_grad_norm:g}), and check"
            " the data for empty or extreme rows. Then run with --fresh, or with another output.dir."
        )

    def where(self) -> str:
        return f"stage {self.phase.stage}, phase {self.phase.name}, step {self.phase.start + self.state.global_step}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.model.eval()
        forward = model_forward(self.model, self.args.device)
        scores = self.task.evaluate(forward, "validation", self.settings.eval_batch_size)
        self.model.train()
        metrics = {f"eval_{s.name}": s.value for s in scores}
        self.log(dict(metrics))
        self._keep_best(scores)
        return metrics

    def _keep_best(self, scores: Sequence[Score]) -> None:
        """The best epoch by the main metric, then by the loss. Masks still move in a warm-up: it has no best epoch."""
        if not self.settings.keep_best or self.compressors:
            return
        rank = [
            s.value if s.higher_is_better else -s.value for s in (scores[0], *(s for s in scores if s.name == "loss"))
        ]
        better = self.best is None or rank > self.best["rank"]
        self._bad_epochs = 0 if better else self._bad_epochs + 1
        if better:
            self.best = {"metric": scores[0].name, "rank": rank, "step": self.state.global_step}
            self.save_weights(self.folder / f".{BEST}")
            if self.args.should_save:
                (self.folder / f".{BEST}").replace(self.folder / BEST)
        if self.settings.patience and self._bad_epochs >= self.settings.patience:
            self.control.should_training_stop = True
            self.control.should_save = False  # a run that continues from here would train on

    def load_best(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.best is not None and self.best["step"] != self.state.global_step:
            self.load_weights(self.folder / BEST)

    # -- resume

    def checkpoint_facts(self) -> dict[str, Any]:
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in (self._tr_loss, *self._terms.values())])
        unlogged = {
            "since": self._globalstep_last_logged,
            "terms": list(self._terms),
            "sums": self.accelerator.gather(sums[None].to(self.args.device)).tolist(),  # one row per process
            "count": self._term_count,
        }
        return {
            "best": self.best,
            "bad_epochs": self._bad_epochs,
            "elapsed_s": self.elapsed(),
            "unlogged": unlogged,
        }

    def resume_facts(self, folder: Path) -> None:
        facts = checkpoint.facts(folder)
        self.best, self._bad_epochs = facts["best"], facts["bad_epochs"]
        self.before_s = facts["elapsed_s"]
        self._unlogged = facts["unlogged"]

    def restore_unlogged(self) -> None:
        """Sums of losses since the last log, so that a row of the history does not tell where a run was stopped."""
        if self._unlogged is not None:
            sums = torch.tensor(self._unlogged["sums"][self.args.process_index], device=self.args.device)
            self._tr_loss, self._globalstep_last_logged = sums[0], self._unlogged["since"]
            self._terms = dict(zip(self._unlogged["terms"], sums[1:]))
            self._term_count = self._unlogged["count"]

    def elapsed(self) -> float:
        return self.before_s + time.monotonic() - self._started


def model_forward(model: nn.Module, device: torch.device | str = "cpu") -> Callable[[dict], dict]:
    """model as a function from a batch to its outputs, without gradients."""

    def forward(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            outputs = model(**{k: v.to(device) for k, v in batch.items()})
        return {k: v.cpu() for k, v in outputs.items() if isinstance(v, torch.Tensor)}

    return forward


def train_phase(
    model: nn.Module,
    *,
    phase: Phase,
    train: Train,
    data: Task,
    folder: Path,
    seed: int,
    stop: Callable[[], bool],
    precision: MixedPrecision,
    compressors: Sequence[TrainingMethod] = (),
    distiller: Distiller | None = None,
    watch: bool = False,
) -> tuple[list[dict[str, Any]], float]:
    """Train in place, from the newest whole checkpoint if there is one.

    watch: keep the examples with the largest activations, see peaks.py.
    Returns the training log as rows for the report, and the seconds that earlier, killed
    attempts trained. Raises Stopped after a checkpoint when `stop()` turns true,
    TrainingError on a loss that is not finite.
    """
    seed = phase_seed(seed, phase)
    set_seed(seed)
    path = folder / f"peaks-{PartialState().process_index}.safetensors"
    peaks = Peaks(model, path, data.secret) if watch else None
    trainer = PhaseTrainer(
        model,
        phase=phase,
        train=train,
        data=data,
        folder=folder,
        seed=seed,
        stop=stop,
        precision=precision,
        compressors=compressors,
        distiller=distiller,
        peaks=peaks,
    )
    found = checkpoint.latest(folder)
    if found is not None:
        log.info("resuming %s/%s from %s", phase.stage, phase.name, found.name)
        trainer.resume_facts(found)
        if peaks is not None:
            peaks.load()
    try:
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    except TrainingError as error:
        if trainer.master_weights is None:
            raise
        raise TrainingError(f"In {trainer.where()}: {error}") from None
    if peaks is not None:
        peaks.remove()
        peaks.save()
    trainer.load_best()
    trainer.release()
    trainer.accelerator.wait_for_everyone()
    rows = history_rows(trainer.state.log_history, phase)
    return rows, trainer.before_s
