"""Optimizers that a script makes itself get masters and the parameters of compressors, or are refused."""

from __future__ import annotations

import pytest
import torch
from kit.long import except_for
from kit.training import Rows, arguments, masters, model, same
from torch import nn

from mptrain import MasterWeights, Trainer
from mptrain.core.errors import UserError


class Layerwise(Trainer):
    """As scripts do it: smaller rates for lower layers, without super()."""

    def create_optimizer(self):
        if self.optimizer is None:
            rate = self.args.learning_rate
            lower, upper = self.model.bert.parameters(), self.model.classifier.parameters()
            self.optimizer = torch.optim.AdamW(
                [{"params": list(lower), "lr": rate / 10}, {"params": list(upper)}], lr=rate
            )
        return self.optimizer


class Scores:
    """A compressor that trains three numbers."""

    name = "scores"

    def __init__(self):
        self.score, self.followed = nn.Parameter(torch.zeros(3)), None

    def parameter_groups(self):
        return [{"params": [self.score], "lr": 0.5, "weight_decay": 0.0}]

    def gradients(self, usable):
        self.score.grad = torch.ones(3)

    def follow(self, masters):
        self.followed = masters

    def updated(self, step):
        pass

    def logs(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def run(cls, folder, compressors=(), optimizers=(None, None), m=None, **kwargs):
    torch.manual_seed(2)
    m = m or model()
    trainer = cls(m, arguments(folder, **kwargs), train_dataset=Rows(), compressors=compressors, optimizers=optimizers)
    trainer.train()
    return trainer


@pytest.mark.parametrize("precision", except_for(["fp16-master", "bf16-master", "bf16-split"], ["bf16-split"]))
def test_a_create_optimizer_without_super_gets_masters(tmp_path, precision):
    t = run(Layerwise, tmp_path / "half", precision=precision, max_steps=6)
    plain = run(Layerwise, tmp_path / "plain", max_steps=6)
    assert isinstance(t.master_weights, MasterWeights) and t.model.classifier.weight.dtype != torch.float32
    assert t.lr_scheduler.get_last_lr() == plain.lr_scheduler.get_last_lr() and len(t.optimizer.param_groups) == 2
    for n, p in plain.model.named_parameters():
        assert (masters(t)[n] - p).abs().max() < 3e-3
    t.train()
    assert len(t.optimizer.param_groups) == 2


@pytest.mark.parametrize("precision", [None, "bf16-master"])
@pytest.mark.parametrize("how", ["default", "create_optimizer", "given"])
def test_what_compressors_train_is_in_every_optimizer_once(tmp_path, how, precision):
    scores, m = Scores(), model()
    given = (torch.optim.AdamW(m.parameters(), lr=1e-3), None) if how == "given" else (None, None)
    cls = Layerwise if how == "create_optimizer" else Trainer
    t = run(cls, tmp_path, [scores], given, m, precision=precision, max_steps=3)
    assert (scores.score.detach() < -0.5).all()
    held = [p for group in t.optimizer.param_groups for p in group["params"]]
    assert sum(p.shape == scores.score.shape for p in held) == 1
    assert (scores.followed is t.master_weights) == (precision is not None) or precision is None


def test_a_create_optimizer_that_sets_none_is_named(tmp_path):
    class Forgetful(Trainer):
        def create_optimizer(self):
            return torch.optim.AdamW(self.model.parameters())

    with pytest.raises(UserError, match=r"create_optimizer of Forgetful left None in self\.optimizer"):
        run(Forgetful, tmp_path, precision="bf16-master")


def test_frozen_weights_are_not_saved_beside_the_model(tmp_path):
    """Their masters would be in every checkpoint twice."""
    m = model()
    m.bert.requires_grad_(False)
    t = run(Trainer, tmp_path, m=m, precision="bf16-master", max_steps=4, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert (folder / "optimizer.safetensors").stat().st_size < 3 * 4 * trained + 4000
    again = model(seed=7)
    again.bert.requires_grad_(False)
    torch.manual_seed(2)
    resumed = Trainer(again, arguments(tmp_path, precision="bf16-master", max_steps=4), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(folder))
    assert same(masters(resumed), masters(t))


def test_an_optimizer_state_beside_other_frozen_weights_is_told(caplog):
    def start(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        return net, MasterWeights(net, torch.optim.AdamW(net[1].parameters()))

    net, mw = start(0)
    state = mw.state_dict()
    assert set(state["masters"]) == {"1.weight", "1.bias"}
    _, same_mw = start(0)
    same_mw.load_state_dict(state)
    assert "frozen weights" not in caplog.text
    other, other_mw = start(1)
    other_mw.load_state_dict(state)
    assert "the frozen weights are not those" in caplog.text
    other.load_state_dict(net.state_dict())
    assert same(other_mw.masters.read(), mw.masters.read())
    old = {**state, "masters": mw.masters.read()}  # as saved before: frozen ones too
    del old["frozen"]
    _, third_mw = start(2)
    third_mw.load_state_dict(old)
    assert same(third_mw.masters.read(), mw.masters.read())
