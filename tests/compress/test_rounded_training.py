"""Weights that train through their rounding: where they start, what moves, what the records hold, and stopping."""

import copy

import pytest
import torch
from kit.tiny_models import inputs, tiny
from kit.training import OfInputs, arguments

from mptrain import Trainer
from mptrain.compress.base import Tools
from mptrain.compress.methods import method_class
from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.rounded_training import RoundedTrainer
from mptrain.core.errors import ModelError
from mptrain.recipe import RoundedTraining, WeightOnly

GATE = "model.layers.0.mlp.gate_proj.weight"
KINDS = [
    {"block_size": 16},
    {"block_size": 16, "symmetric": False},
    {"granularity": "channel", "bits": 8},
    {"granularity": "tensor"},
]


def settings(**changes):
    return WeightOnly.model_validate({"mode": "weight_only", "block_size": 16, "finetune": {}} | changes)


def batches(family="llama"):
    return [inputs(family, batch=4, seed=i) for i in range(3)]


def trainer(model, family="llama", inside=0.45, **changes):
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    weight_only.compress(model, settings(**changes), batches(family))
    found = records.distinct(records.of(model))
    records.forget(model)
    ours = RoundedTrainer(found, {name: dense[name] for name in found}, RoundedTraining(inside=inside))
    ours.prepare(model)
    return ours, found, dense


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("inside", [0.45, 0.0])
def test_training_starts_with_the_integers_of_the_method_and_weights_as_near_to_the_dense_as_they_allow(
    changes, family, inside
):
    ours, found, dense = trainer(tiny(family), family, inside, **changes)
    for name, record in ours.records().items():
        assert torch.equal(record.q, found[name].q) and torch.equal(record.scale, found[name].scale)
        scale = record.scale[..., None].expand(*record.scale.shape, record.block_size).flatten(1).expand(record.shape)
        shown, was = record.dense(), records.matrix(dense[name], record.transposed)
        start = records.matrix(ours.weights.dense[name], record.transposed)
        allowed = was.clamp(shown - inside * scale, shown + inside * scale)
        torch.testing.assert_close(start, allowed)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_model_computes_with_what_is_stored_and_learns(changes, family):
    model = tiny(family)
    ours, found, _ = trainer(model, family, **changes)
    batch = inputs(family, labels=True)
    first, optimizer = model(**batch).loss.item(), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(15):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        ours.gradients(True)
        optimizer.step()
        ours.updated(step + 1)
    held = ours.records()
    for name, record in held.items():
        assert torch.equal(model.get_parameter(name).detach(), record.weight().view_as(model.get_parameter(name)))
        assert torch.equal(record.scale, found[name].scale)
    assert any(not torch.equal(record.q, found[name].q) for name, record in held.items())
    assert 0 < ours.logs()["compress/moved"] < 1
    assert model(**batch).loss.item() < 0.9 * first
    trained = model(**batch).logits
    records.attach(model, held)
    assert torch.equal(model(**batch).logits, trained) and set(records.of(model)) >= set(held)


def test_a_weight_is_updated_by_the_gradient_of_what_the_model_computed_with():
    model = tiny("llama")
    ours, _, _ = trainer(model)
    before, batch = ours.weights.dense[GATE].clone(), inputs("llama", labels=True)
    model(**batch).loss.backward()
    gradient = model.get_parameter(GATE).grad.clone()
    ours.gradients(True)
    torch.optim.SGD([model.get_parameter(GATE)], lr=1e-3).step()
    ours.updated(1)
    torch.testing.assert_close(ours.weights.dense[GATE], before - 1e-3 * gradient)


def test_weights_stay_within_half_a_level_of_the_outermost_ones():
    model = tiny("llama")
    ours, _, _ = trainer(model)
    ours.gradients(True)
    model.get_parameter(GATE).data += 100.0
    ours.updated(1)
    record = ours.records()[GATE]
    assert (record.q == 7).all()
    scale = record.scale[..., None].expand(*record.scale.shape, 16).flatten(1)
    torch.testing.assert_close(ours.weights.dense[GATE], 7.5 * scale)
    ours.gradients(True)
    model.get_parameter(GATE).data -= 1.2 * scale  # and turn at once
    ours.updated(2)
    assert (ours.records()[GATE].q == 6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_the_last_step_broke_are_no_integers(bad):
    """Infinite ones are put back into reach; NaN has no level."""
    model = tiny("llama")
    ours, _, _ = trainer(model)
    ours.gradients(True)
    model.get_parameter(GATE).data[3, 5] = bad
    ours.updated(1)
    if bad == float("inf"):
        assert ours.records()[GATE].q[3, 5] == 7
        return
    with pytest.raises(ModelError, match=rf"{GATE}: 1 of {model.get_parameter(GATE).numel()} weights are NaN"):
        ours.records()


def test_a_stopped_training_continues_bit_for_bit():
    def start():
        model = tiny("llama")
        ours, _, _ = trainer(model)
        return model, ours, torch.optim.AdamW(model.parameters(), lr=3e-3)

    def steps(model, ours, optimizer, numbers):
        for step in numbers:
            optimizer.zero_grad()
            model(**inputs("llama", labels=True, seed=step)).loss.backward()
            ours.gradients(True)
            optimizer.step()
            ours.updated(step + 1)

    through, whole, optimizer = start()
    steps(through, whole, optimizer, range(7))
    model, first, optimizer = start()
    steps(model, first, optimizer, range(3))
    state = {name: value.clone() for name, value in first.state_dict().items()}
    weights, momentum = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed, second, optimizer = start()
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    second.load_state_dict(state)
    steps(resumed, second, optimizer, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters()))
    assert all(torch.equal(record.q, second.records()[name].q) for name, record in whole.records().items())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stand_still_as_they_were_rounded(tied):
    torch.manual_seed(0)
    model = tiny("llama", tie_word_embeddings=tied)
    method = method_class(settings())(settings())
    made = method.prepare(model, Tools(inputs=batches, steps=4))
    still = method.still(made)
    assert [p is made.model.embed_tokens.weight for p in still] == [True]
    for parameter in still:
        parameter.requires_grad_(False)
    table, head = (m.weight.detach().clone() for m in (made.model.embed_tokens, made.lm_head))
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        made(**inputs("llama", labels=True)).loss.backward()
        method.training().gradients(True)
        optimizer.step()
        method.training().updated(step + 1)
    made = method.finalize(made, Tools(inputs=batches, steps=4))
    assert torch.equal(made.model.embed_tokens.weight, table)
    assert torch.equal(made.lm_head.weight, head) == tied
    held = records.of(made)
    assert held["model.embed_tokens.weight"].bits == held["lm_head.weight"].bits == 8
    assert held[GATE].bits == 4 and held[GATE].block_size == 16
    assert {row["weight"] for row in method.facts()["compressed"]} == set(records.distinct(held))


def test_half_precision_training_follows_that_in_fp32(tmp_path):
    def trained(precision):
        model = tiny("llama")
        ours, _, _ = trainer(model)
        asked = arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, precision=precision)
        run = Trainer(model, asked, train_dataset=OfInputs("llama"), compressors=[ours])
        run.train()
        run.release()
        records.attach(model, ours.records())
        assert model.dtype == torch.float32 and set(records.of(model)) >= set(ours.records())
        return ours.weights.dense, ours.records()

    (full, whole), (half, rounded) = trained("fp32"), trained("bf16-master")
    for name, weight in full.items():
        assert weight.dtype == half[name].dtype == torch.float32
        assert (weight - half[name]).abs().mean() < 1e-3, name
        assert (whole[name].q == rounded[name].q).float().mean() > 0.95
