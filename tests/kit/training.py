"""A tiny BERT, rows and arguments for mptrain.Trainer, and a callback that breaks its activations."""

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

from kit.tiny_models import inputs
from mptrain import TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=64, bad=()):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, 50, (n, 8), generator=generator)
        self.labels = (self.ids[:, 0] > 25).long()
        self.bad = bad

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class OfInputs(torch.utils.data.Dataset):
    """Labelled inputs of a model of kit.tiny_models."""

    def __init__(self, name, n=24):
        self.name, self.n = name, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {name: value[0] for name, value in inputs(self.name, batch=1, labels=True, seed=i).items()}


def model(seed=1, **config):
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    return BertForSequenceClassification(BertConfig(**(settings | config)))


def arguments(folder, **kwargs):
    defaults = dict(max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[])
    defaults |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False)
    return TrainingArguments(output_dir=str(folder), **(defaults | kwargs))


def masters(t):
    return {n: m.clone() for n, m in t.master_weights.masters.read().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class AtTheStart(transformers.TrainerCallback):
    """Keeps weights (masters), moments and schedule as training begins, after a checkpoint was loaded.

    A run that is resumed at its last step still takes one, with transformers too.
    """

    def attach(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        return trainer

    def on_train_begin(self, args, state, control, **kwargs):
        t = self.trainer
        half = getattr(t, "master_weights", None)
        plain = {n: p.detach().clone() for n, p in t.model.named_parameters()}
        self.weights = plain if half is None else masters(t)
        states = t.optimizer.state_dict()["state"]
        self.moments = {i: {k: torch.as_tensor(x).clone() for k, x in s.items()} for i, s in states.items()}
        self.schedule = t.lr_scheduler.state_dict()["last_epoch"]

    def has_moments(self, expected):
        return bool(expected) and all(
            torch.equal(self.moments[i][k], x) for i, s in expected.items() for k, x in s.items()
        )


class Poison(transformers.TrainerCallback):
    """Makes the embedding's output NaN from a step on."""

    def __init__(self, m, start, end):
        self.step, self.start, self.end = 0, start, end
        m.bert.embeddings.register_forward_hook(self.hook)

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step

    def hook(self, module, args, output):
        return output * float("nan") if self.start <= self.step < self.end and module.training else output
