"""Checkpoints of mptrain.Trainer: tied plain modules, data without a length, and to and from transformers' Trainer."""

from __future__ import annotations

import io
from collections import defaultdict

import pytest
import torch
import transformers
from kit.long import except_for
from kit.training import AtTheStart, Rows, arguments, masters, model, same
from safetensors.torch import load_file
from torch import nn

from mptrain import Trainer
from mptrain.core.errors import UserError
from mptrain.precision import moments8
from mptrain.train import checkpoint


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def train(cls, folder, resume=None, m=None, data=None, start=None, **kwargs):
    torch.manual_seed(2)
    given = arguments(folder, **kwargs)
    if cls is transformers.Trainer:
        given.precision = None
    trainer = cls(m or model(), given, train_dataset=data or Rows())
    if start is not None:
        start.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# -- plain modules


class Tied(nn.Module):
    """Two names of one weight, as nn.Module users tie them, and a defaultdict as output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids, labels=None):
        logits = self.out(torch.tanh(self.inner(self.embed(input_ids))))
        found = defaultdict(list, {"logits": logits})
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits.mean(1), labels)
        return {"loss": found.pop("loss"), **found} if labels is not None else found


@pytest.mark.parametrize("precision", [None, "bf16-master", "bf16-split", "bf16-split-int8"])
def test_a_plain_module_with_tied_weights_is_saved_and_resumed(tmp_path, precision, caplog):
    whole = train(Trainer, tmp_path / "whole", m=Tied(), precision=precision)
    train(Trainer, tmp_path / "part", m=Tied(), precision=precision, save_strategy="steps", save_steps=7)
    folder = tmp_path / "part" / "checkpoint-7"
    assert sorted(load_file(folder / "model.safetensors")) == ["embed.weight", "inner.bias", "inner.weight"]
    m = Tied()
    nn.init.zeros_(m.embed.weight)
    resumed = train(Trainer, tmp_path / "part", str(folder), m=m, precision=precision)
    assert same(weights(resumed), weights(whole))
    assert resumed.model.out.weight is resumed.model.embed.weight
    assert "missing keys" not in caplog.text


def test_the_best_plain_module_is_loaded(tmp_path):
    torch.manual_seed(2)
    options = dict(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, learning_rate=5.0)
    options |= dict(load_best_model_at_end=True, save_total_limit=1)
    trainer = Trainer(Tied(), arguments(tmp_path, **options), train_dataset=Rows(), eval_dataset=Rows(16))
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert same({n: weights(trainer)[n] for n in best}, best)


# -- data without a length


class Stream(torch.utils.data.IterableDataset):
    """40 rows from the first on, or shuffled anew in each pass as streamed data sets are."""

    def __init__(self, shuffled, seen):
        self.rows, self.shuffled, self.seen, self.epoch = Rows(40), shuffled, seen, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = list(range(40))
        if self.shuffled:
            order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for i in order:
            yield {**self.rows[i], "row": torch.tensor(i)}


class Watching(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        self.train_dataset.seen.append(inputs.pop("row").tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shuffled", except_for([False, True], [True]))
@pytest.mark.parametrize("step", except_for([5, 15, 20], [15]))
def test_data_without_a_length_goes_on_at_the_row_where_it_was(tmp_path, shuffled, step, accumulation):
    """10 batches a pass: step 15 is in the second or third, step 20 (of one batch) at the end of the second."""
    options = dict(max_steps=25, per_device_train_batch_size=4, remove_unused_columns=False)
    options |= dict(gradient_accumulation_steps=accumulation)
    seen, again = [], []
    data = Stream(shuffled, seen)
    whole = train(Watching, tmp_path / "a", data=data, save_strategy="steps", save_steps=step, **options)
    folder = str(tmp_path / "a" / f"checkpoint-{step}")
    resumed = train(Watching, tmp_path / "b", folder, data=Stream(shuffled, again), **options)
    assert resumed.state.global_step == 25
    assert again == seen[step * accumulation :]
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("precision", [None, "bf16-master"])
def test_codes_of_moments_are_numbers_where_training_goes_on_with_fp32_ones(tmp_path, precision):
    train(Trainer, tmp_path / "a", precision="bf16-split-int8", save_strategy="steps", save_steps=6)
    folder = tmp_path / "a" / "checkpoint-6"
    saved = checkpoint.load_state(folder / "optimizer")
    assert {s["exp_avg"].dtype for s in saved["state"].values()} == {torch.int8}
    start = AtTheStart()
    train(Trainer, tmp_path / "b", str(folder), precision=precision, start=start)
    assert start.has_moments(moments8.plain(saved)["state"]) and start.schedule == 6


# -- transformers' Trainer


def test_transformers_trainer_does_not_start_our_optimizer_anew(tmp_path):
    train(Trainer, tmp_path / "ours", save_strategy="steps", save_steps=6)
    folder = tmp_path / "ours" / "checkpoint-6"
    text = (folder / "optimizer.pt").read_text()
    assert "transformers.Trainer" in text and "for_transformers" in text and str(folder) in text
    with pytest.raises(Exception, match="Weights only load failed"):
        train(transformers.Trainer, tmp_path / "theirs", str(folder))


@pytest.mark.parametrize("precision", [None, "bf16-master", "bf16-split-int8"])
def test_a_checkpoint_is_made_one_that_transformers_resumes(tmp_path, precision):
    train(Trainer, tmp_path / "ours", precision=precision, save_strategy="steps", save_steps=6)
    folder = tmp_path / "ours" / "checkpoint-6"
    checkpoint.for_transformers(folder)
    assert checkpoint.fault(folder) is None
    start = AtTheStart()
    train(transformers.Trainer, tmp_path / "theirs", str(folder), start=start)
    state = moments8.plain(checkpoint.load_state(folder / "optimizer"))["state"]
    assert start.has_moments(state) and start.schedule == 6
    assert all(s["exp_avg"].dtype == torch.float32 and s["exp_avg_sq"].any() for s in state.values())
    assert same(start.weights, load_file(folder / "model.safetensors"))
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        checkpoint.for_transformers(tmp_path)


@pytest.mark.parametrize("precision", ["bf16-master", "fp16-master", "bf16-split"])
def test_a_checkpoint_of_transformers_is_resumed_with_precision(tmp_path, precision):
    theirs = train(transformers.Trainer, tmp_path / "theirs", save_strategy="steps", save_steps=6)
    folder = tmp_path / "theirs" / "checkpoint-6"
    start = AtTheStart()
    end = train(Trainer, tmp_path / "a", str(folder), precision=precision, start=start)
    assert same(start.weights, load_file(folder / "model.safetensors")) and start.schedule == 6
    assert start.has_moments(torch.load(folder / "optimizer.pt", weights_only=True)["state"])
    assert end.lr_scheduler.state_dict()["last_epoch"] == theirs.lr_scheduler.state_dict()["last_epoch"]
    for n, p in weights(theirs).items():
        assert (masters(end)[n] - p).norm() < 0.02 * (1 + p.norm())


def test_precision_given_to_transformers_trainer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"acts in mptrain\.Trainer only"):
        transformers.Trainer(model(), arguments(tmp_path, precision="bf16-master"), train_dataset=Rows())
    transformers.Trainer(model(), arguments(tmp_path, precision="fp32"), train_dataset=Rows())
    transformers.Trainer(model(), arguments(tmp_path), train_dataset=Rows())


@pytest.mark.parametrize("precision", ["bf16-master", "bf16-split"])
def test_the_model_in_training_is_pickled_whole(tmp_path, precision):
    t = train(Trainer, tmp_path, precision=precision, max_steps=2)
    file = io.BytesIO()
    torch.save(t.model, file)
    file.seek(0)
    assert same({n: p.detach() for n, p in torch.load(file, weights_only=False).named_parameters()}, masters(t))
