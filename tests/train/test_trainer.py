"""mptrain.Trainer: the same steps as transformers.Trainer, exact resume, the order of compressor calls."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections import Counter

import pytest
import torch
import transformers
from kit.long import except_for
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from mptrain.core.errors import UserError
from mptrain.recipe import Distill, Magnitude
from mptrain.train import checkpoint
from mptrain.train.distill import Distiller
from mptrain.train.trainer import Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=64):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, 50, (n, 8), generator=generator)
        self.labels = torch.randint(0, 2, (n,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def model(dropout=0.1):
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def arguments(folder, **kwargs):
    defaults = dict(max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[])
    defaults |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False)
    return TrainingArguments(output_dir=str(folder), **(defaults | kwargs))


def train(cls, folder, resume=None, m=None, callbacks=None, trainer_kwargs=None, **kwargs):
    torch.manual_seed(2)
    trainer = cls(
        m or model(), arguments(folder, **kwargs), train_dataset=Rows(), callbacks=callbacks, **(trainer_kwargs or {})
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Averaging(transformers.Trainer):
    """Knows that the loss of BERT is the mean of a micro-batch; transformers 5.5 takes it for a part of a sum."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_nothing_enabled_it_is_transformers_trainer_bit_for_bit(tmp_path, accumulation):
    ours = train(Trainer, tmp_path / "a", gradient_accumulation_steps=accumulation)
    theirs = train(Averaging, tmp_path / "b", gradient_accumulation_steps=accumulation)
    assert equal(weights(ours), weights(theirs))
    keys = ("loss", "grad_norm", "learning_rate", "step")
    assert [[e.get(k) for k in keys] for e in ours.state.log_history[:-1]] == [
        [e.get(k) for k in keys] for e in theirs.state.log_history[:-1]
    ]


@pytest.mark.parametrize("step", except_for([3, 8, 11], [8]))
def test_resume_is_exact_with_dropout(tmp_path, step):
    whole = train(Trainer, tmp_path / "whole")
    first = train(Trainer, tmp_path / "part", save_strategy="steps", save_steps=step)
    assert equal(weights(first), weights(whole))
    resumed = train(Trainer, tmp_path / "part", resume=str(tmp_path / "part" / f"checkpoint-{step}"))
    assert resumed.state.global_step == 12
    assert equal(weights(resumed), weights(whole))


def test_a_checkpoint_holds_no_pickle_and_a_planted_one_does_not_run(tmp_path):
    train(Trainer, tmp_path / "run", save_strategy="steps", save_steps=6)
    folder = tmp_path / "run" / "checkpoint-6"
    assert {p.suffix for p in folder.iterdir() if p.name not in checkpoint.FOREIGN} <= {".json", ".safetensors"}
    assert all("no pickle" in (folder / name).read_text() for name in checkpoint.FOREIGN)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    planted = pickle.dumps(Evil())
    for path in sorted(p for p in folder.iterdir() if p.name not in checkpoint.FOREIGN):
        whole = path.read_bytes()
        path.write_bytes(planted)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            train(Trainer, tmp_path / "run", resume=str(folder))
        if path.name != checkpoint.MANIFEST:
            checkpoint.seal(folder)  # whoever can plant a file can write its hash, too
            with contextlib.suppress(Exception):
                train(Trainer, tmp_path / "run", resume=str(folder))
        assert not (tmp_path / "ran").exists()
        path.write_bytes(whole)
        checkpoint.seal(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(planted)
    train(Trainer, tmp_path / "run", resume=str(folder))
    assert not (tmp_path / "ran").exists()


class Recorder:
    """A compressor that records when it is called and trains one score."""

    name = "recorder"

    def __init__(self, m):
        self.model, self.calls = m, []
        self.score = nn.Parameter(torch.zeros(3))

    def parameter_groups(self):
        return [{"params": [self.score], "lr": 0.5, "weight_decay": 0.0}]

    def gradients(self, usable):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.calls.append(("gradients", len(grads) > 0))
        self.score.grad = torch.ones(3)

    def updated(self, step):
        self.calls.append(("updated", step))

    def logs(self):
        return {"compress/score": float(self.score.detach().mean())}

    def state_dict(self):
        return {"score": self.score.detach().clone()}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.score.copy_(state["score"])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_compressors_are_called_once_a_step_in_order_and_resume_exactly(tmp_path, clip):
    def run(folder, resume=None, **kwargs):
        m = model()
        recorder = Recorder(m)
        trainer = train(
            Trainer,
            folder,
            resume=resume,
            m=m,
            trainer_kwargs={"compressors": [recorder]},
            max_grad_norm=clip,
            gradient_accumulation_steps=2,
            max_steps=4,
            **kwargs,
        )
        return trainer, recorder

    trainer, recorder = run(tmp_path / "a", save_strategy="steps", save_steps=2)
    assert recorder.calls == [c for s in range(1, 5) for c in (("gradients", True), ("updated", s))]
    assert len(trainer.optimizer.param_groups) == 3
    logged = [e["compress/score"] for e in trainer.state.log_history if "compress/score" in e]
    assert len(logged) == 4 and logged[-1] < logged[0] < 0
    resumed, again = run(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(again.score, recorder.score)
    assert equal(weights(resumed), weights(trainer))


def test_distillation_terms_are_logged_as_means_since_the_last_log(tmp_path):
    trainer = train(
        Trainer, tmp_path, trainer_kwargs={"distiller": Distiller(model(), Distill(weight=0.5))}, logging_steps=4
    )
    rows = [e for e in trainer.state.log_history if "task_loss" in e]
    assert len(rows) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["task_loss"] + 0.5 * row["distill_loss"], abs=2e-4)


def test_label_smoothing_acts_under_a_distiller(tmp_path):
    kept = {"distiller": Distiller(model(), Distill(weight=0.0))}
    smooth = train(Trainer, tmp_path / "a", trainer_kwargs=kept, label_smoothing_factor=0.2)
    theirs = train(transformers.Trainer, tmp_path / "b", label_smoothing_factor=0.2)
    assert equal(weights(smooth), weights(theirs))
    assert not equal(weights(smooth), weights(train(transformers.Trainer, tmp_path / "c")))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"compressors": [Magnitude(method="magnitude", keep={"macs": 0.5})]},
            TypeError,
            "already prepared on it; got",
        ),
        ({"distiller": Distill()}, TypeError, r"Distiller\(teacher, settings\); got Distill"),
        (
            {"distiller": Distiller(model(), Distill()), "compute_loss_func": lambda *a, **k: None},
            UserError,
            "not both",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        Trainer(model(), arguments(tmp_path), train_dataset=Rows(), **kwargs)


def test_resuming_takes_the_newest_whole_checkpoint(tmp_path, caplog):
    first = train(Trainer, tmp_path / "run", save_strategy="steps", save_steps=4)
    newest = tmp_path / "run" / "checkpoint-12"
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    resumed = train(Trainer, tmp_path / "run", resume=True)
    assert "checkpoint-12 is not usable: optimizer.safetensors has" in caplog.text
    assert resumed.state.global_step == 12
    assert equal(weights(resumed), weights(first))
    with pytest.raises(UserError, match=r"checkpoint-12 is not a whole checkpoint: optimizer\.safetensors has"):
        train(Trainer, tmp_path / "run", resume=str(newest))
    with pytest.raises(UserError, match="there is no such folder"):
        train(Trainer, tmp_path / "run", resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no whole checkpoint in"):
        train(Trainer, tmp_path / "empty", resume=True)


def test_checkpoints_of_transformers_own_trainer_are_taken_up(tmp_path):
    first = train(transformers.Trainer, tmp_path / "run", save_strategy="steps", save_steps=8)
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    resumed = train(Trainer, tmp_path / "run", resume=True)
    assert resumed.state.global_step == 12
    assert equal(weights(resumed), weights(first))


def test_weight_decay_leaves_quantizers_alone(tmp_path):
    trainer = Trainer(model(), arguments(tmp_path), train_dataset=Rows())
    trainer.model.add_module("__nncf_hooks", nn.Linear(2, 2))
    names = trainer.get_decay_parameter_names(trainer.model)
    assert names and not [n for n in names if "nncf" in n]


def test_checkpoints_rotate_and_the_best_model_loads(tmp_path):
    seen = Counter()

    def metrics(prediction):
        seen["n"] += 1
        return {"score": -seen["n"]}  # the first evaluation is the best

    torch.manual_seed(2)
    trainer = Trainer(
        model(),
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            save_total_limit=1,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        compute_metrics=metrics,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert equal(saved, weights(trainer))
