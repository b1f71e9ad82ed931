"""Masks in place against autograd through W ⊙ M, step by step."""

import copy

import pytest
import torch
from tiny_models import inputs, tiny
from torch.func import functional_call

from mptrain.compress.masked import MaskedWeights

NAMES = [
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.attention.self.query.bias",
    "bert.encoder.layer.1.output.dense.weight",
]


def random_masks(model, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [model.get_parameter(name).shape for name in NAMES]
    masks = [torch.rand(shape, generator=generator) > 0.5 for shape in shapes]
    masks[2] = masks[2][:1]  # one column mask for all rows
    return dict(zip(NAMES, masks))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_is_autograd_through_the_product(optimizer):
    ours, reference = tiny("bert"), tiny("bert")
    masked = MaskedWeights({name: ours.get_parameter(name) for name in NAMES})
    first = optimizer(ours.parameters(), lr=0.01)
    second = optimizer(reference.parameters(), lr=0.01)
    masks = random_masks(ours, 0)
    masked.apply(masks)
    for step in range(4):
        batch = inputs("bert", labels=True, seed=step)
        first.zero_grad()
        ours(**batch).loss.backward()
        masked.gradients_ready()
        first.step()
        masked.take_update()

        second.zero_grad()
        products = {name: reference.get_parameter(name) * mask for name, mask in masks.items()}
        functional_call(reference, products, kwargs=batch).loss.backward()
        second.step()
        for (name, p), (_, q) in zip(ours.named_parameters(), reference.named_parameters()):
            assert torch.equal(p, q), name
            assert torch.equal(p.grad, q.grad), name
        masks = random_masks(ours, step + 1)
        masked.apply(masks)
        for name, mask in masks.items():
            assert torch.equal(ours.get_parameter(name), reference.get_parameter(name) * mask)
    masked.restore()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), reference.parameters()))


def test_frozen_and_unused_parameters():
    model = tiny("bert")
    model.get_parameter(NAMES[0]).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masked = MaskedWeights({name: model.get_parameter(name) for name in NAMES})
    masks = random_masks(model, 0)
    masked.apply(masks)
    masked.gradients_ready()  # nobody called backward
    masked.take_update()
    masked.apply(masks)
    assert torch.equal(model.get_parameter(NAMES[0]), before[NAMES[0]] * masks[NAMES[0]])
    assert model.get_parameter(NAMES[0]).grad is None
    masked.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missed_call_is_an_error_and_not_lost_weights():
    model = tiny("bert")
    masked = MaskedWeights({name: model.get_parameter(name) for name in NAMES})
    masked.apply(random_masks(model, 0))
    with pytest.raises(RuntimeError, match="without gradients_ready"):
        masked.take_update()
    masked.gradients_ready()
    with pytest.raises(RuntimeError, match="twice"):
        masked.gradients_ready()
