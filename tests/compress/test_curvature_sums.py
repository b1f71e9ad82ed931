"""Curvature sums against plain autograd, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from kit.tiny_models import inputs, tiny

from mptrain.compress.calibrate.curvature import Curvature, curvatures, logits
from mptrain.compress.calibrate.ranks import Ranks
from mptrain.core.errors import ModelError, UserError

NAMES = ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.1.output.dense"]
CONV1D = "transformer.h.0.mlp.c_proj"  # [inputs, outputs]


def collected(model, batches, names=NAMES, **options) -> dict[str, Curvature]:
    return {k: v for group in curvatures(model, names, batches, **options) for k, v in group.items()}


def by_hand(model, batches, name):
    """x and g of real tokens, by a forward pass that keeps them."""
    xs, gs = [], []
    for number, batch in enumerate(batches):
        kept = {}

        def hook(module, given, output, kept=kept):
            output.retain_grad()
            kept["x"], kept["y"] = given[0].detach(), output

        handle = model.get_submodule(name).register_forward_hook(hook)
        logits(model, batch, torch.Generator().manual_seed(number)).backward()
        handle.remove()
        real = batch["attention_mask"].bool()
        xs.append(kept["x"][real].double())
        gs.append(kept["y"].grad[real].double())
    return torch.cat(xs), torch.cat(gs)


@pytest.mark.parametrize(("family", "name"), [*(("bert", name) for name in NAMES), ("gpt2", CONV1D)])
def test_the_sums_are_those_of_autograd_without_padding(family, name):
    model, batches = tiny(family), [inputs(family, seed=s) for s in range(3)]
    x, g = by_hand(model, batches, name)
    model.zero_grad()
    found = collected(model, batches, [name])[name]
    assert found.tokens == len(x) == 3 * 24 and found.examples == 9
    w = g.square().sum(1)
    h, mean = found.covariance(rho=0.25)
    expected_mean = (x * w[:, None]).sum(0) / w.sum()
    centred = x - expected_mean
    expected = 0.75 * (centred * w[:, None]).T @ centred / w.sum() + 0.25 * torch.cov(x.T, correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.gram(), g.T @ g / 9, rtol=1e-5, atol=1e-10)


def test_the_model_is_left_as_it_was_and_groups_do_not_matter():
    model, batches = tiny("bert").train(), [inputs("bert", seed=s) for s in range(2)]
    model.bert.embeddings.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    whole = collected(model, batches)
    single = collected(model, batches, memory=1)
    for name in NAMES:
        for a, b in zip(whole[name].sums(), single[name].sums()):
            assert torch.equal(a, b)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_a_probe_of_class_logits_measures_their_squared_centred_error():
    """E[g gᵀ] over the signs is the Gram of the Jacobian of the centred logits."""
    torch.manual_seed(0)
    z = torch.randn(4000, 3, requires_grad=True)

    class Head(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    logits(Head(), {"x": z}, torch.Generator().manual_seed(0)).backward()
    gram = z.grad.T @ z.grad / len(z)
    torch.testing.assert_close(gram, torch.eye(3) - 1 / 3, rtol=0, atol=0.05)


def test_a_probe_of_many_classes_draws_from_the_models_distribution():
    """E[g gᵀ] is diag(p) - p pᵀ, the Fisher information of a categorical."""
    row = torch.full((2000,), -20.0)
    row[:3] = torch.tensor([1.0, 0.0, -1.0])
    z = row.repeat(3000, 1).requires_grad_(True)

    class Head(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    logits(Head(), {"x": z}, torch.Generator().manual_seed(0)).backward()
    p = row.softmax(0)[:3]
    gram = (z.grad.T @ z.grad)[:3, :3] / len(z)
    torch.testing.assert_close(gram, torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.02)


def test_bad_input_is_named():
    model = tiny("bert")
    with pytest.raises(UserError, match=r"data\.calibration gave no batch"):
        collected(model, [])
    with torch.no_grad():
        model.get_submodule(NAMES[0]).weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        collected(model, [inputs("bert")])


def test_two_ranks_in_turn_add_up_in_the_order_of_the_batches(monkeypatch):
    """Each rank's part is broadcast; here both ranks are played by one process, one after the other."""
    model, batches = tiny("bert"), [inputs("bert", seed=s) for s in range(3)]
    alone = collected(model, batches)
    sent: dict[int, list] = {}
    for index in (0, 1):
        calls = sent.setdefault(index, [])

        def record(rank, tensor, index=index, calls=calls):
            calls.append((rank, tensor.clone()))
            return tensor

        monkeypatch.setattr("mptrain.compress.calibrate.curvature.from_rank", record)
        collected(model, batches, ranks=Ranks(index, 2))

    position = iter(range(len(sent[0])))
    monkeypatch.setattr(
        "mptrain.compress.calibrate.curvature.from_rank", lambda rank, tensor: sent[rank][next(position)][1]
    )
    both = collected(model, batches, ranks=Ranks(0, 2))
    for name in NAMES:
        assert (both[name].tokens, both[name].examples) == (alone[name].tokens, alone[name].examples)
        for a, b in zip(alone[name].sums(), both[name].sums()):
            assert torch.equal(a, b)
