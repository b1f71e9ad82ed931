"""Masks in place against autograd through W ⊙ M, step by step."""

import copy

import pytest
import torch
from kit.tiny_models import inputs, logits, tiny
from torch.func import functional_call

from mptrain.compress.prune.masked import MaskedWeights
from mptrain.compress.prune.movement import MovementPruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink, slices_of
from mptrain.core.hooks import HOOKS
from mptrain.recipe import Movement, Qat

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


@pytest.mark.parametrize("score", ["shared", "block"])
def test_acts_under_fake_quantizers(score):
    """Masks, quantizers and scores in the same steps; shrunk with sliced quantizers is what was masked."""
    config = {
        "method": "movement",
        "keep": {"encoder_params": 0.5},
        "score": score,
        "schedule": {"end": 6, "unit": "step"},
        "attention_block": (8, 16),
        "score_lr": 0.02,
        "round_ffn": 1,
    }
    model = quantizers.quantize(tiny("bert"), Qat.model_validate({"mode": "qat"}), [inputs("bert", seed=9)]).train()
    structure = find_structure(model)
    ours = MovementPruner(
        Movement.model_validate(config), structure=structure, phase_steps=6, steps_per_epoch=6, lr=0.01
    )
    ours.prepare(model)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, *ours.parameter_groups()], lr=0.01)
    ranges = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if HOOKS in name}
    for step in range(6):
        optimizer.zero_grad()
        model(**inputs("bert", labels=True, seed=step)).loss.backward()
        ours.gradients(True)
        optimizer.step()
        ours.updated(step + 1)
    assert 0.3 < ours.sparsity() < 0.7
    assert any(not torch.equal(model.get_parameter(name), before) for name, before in ranges.items())

    kept = ours.kept()
    ours._set_kept(kept)  # whole units, as block masks are resolved
    ours.masked.apply(ours._masks)
    expected = logits(model.eval(), inputs("bert"))
    ours.restore_dense()
    plain, description, tensors = quantizers.detach(model)
    shrink(plain, structure, kept)
    sliced = quantizers.slice_quantizers(description, tensors, slices_of(structure, kept))
    shrunk = quantizers.attach(plain, *sliced).eval()
    torch.testing.assert_close(logits(shrunk, inputs("bert")), expected, rtol=0, atol=1e-5)
