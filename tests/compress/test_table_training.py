"""Tables that train: their gradients, their assignments, and stopping in between."""

import copy

import pytest
import torch
from kit.tiny_models import inputs, tiny, train
from kit.training import OfInputs, arguments

from mptrain import Trainer
from mptrain.compress.weights import records
from mptrain.compress.weights.palettize import palettize
from mptrain.compress.weights.records import Palettized
from mptrain.compress.weights.table_training import TableTrainer, nearest
from mptrain.recipe import Palettize, TableTraining

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def trainer(model, refresh=0, lr=0.01, **changes):
    config = Palettize.model_validate({"method": "kmeans", "bits": 2, "group_size": 8} | changes)
    ours = TableTrainer(palettize(model, config), TableTraining(refresh=refresh), lr=lr)
    ours.prepare(model)
    return ours


def optimizer(model, ours):
    found = torch.optim.AdamW(model.parameters(), lr=ours.lr)
    for group in ours.parameter_groups():
        found.add_param_group(group)
    return found


@pytest.mark.parametrize("changes", [{}, {"per_channel_scale": True}, {"cluster_dim": 2, "bits": 4}])
def test_the_gradient_of_an_entry_is_that_of_all_weights_that_use_it(changes):
    model = tiny("bert")
    ours = trainer(model, **changes)
    batch = inputs("bert", labels=True)
    table = ours.tables[QUERY].detach().clone().requires_grad_()
    record = ours.records()[QUERY]
    rows = torch.arange(32) // record.rows_per_group
    weight = table[rows[:, None], record.indices.long()].flatten(1)
    if record.per_channel_scale is not None:
        weight = weight * record.per_channel_scale
    torch.testing.assert_close(weight.detach(), model.get_parameter(QUERY).detach(), atol=1e-3, rtol=1e-3)
    loss = torch.func.functional_call(model, {QUERY: weight}, kwargs=batch).loss
    (expected,) = torch.autograd.grad(loss, table)
    model(**batch).loss.backward()
    ours.gradients(True)
    torch.testing.assert_close(ours.tables[QUERY].grad, expected)


@pytest.mark.parametrize("changes", [{}, {"per_channel_scale": True}, {"cluster_dim": 2, "bits": 4}])
@pytest.mark.parametrize("refresh", [0, 3])
def test_training_lowers_the_loss_and_the_model_stays_palettized(refresh, changes):
    model = tiny("bert")
    ours = trainer(model, refresh, lr=2e-3, **changes)
    before = {name: indices.clone() for name, indices in ours.indices.items()}
    batch = inputs("bert", labels=True)
    first, opt = model(**batch).loss.item(), optimizer(model, ours)
    for step in range(20):
        opt.zero_grad()
        model(**batch).loss.backward()
        ours.gradients(True)
        opt.step()
        ours.updated(step + 1)
        entries = 2 ** ours.records()[QUERY].bits
        groups = model.get_parameter(QUERY).detach().view(4, -1, ours.tables[QUERY].shape[2])
        if not changes.get("per_channel_scale"):
            assert all(len(group.unique(dim=0)) <= entries for group in groups)
    assert model(**batch).loss.item() < 0.85 * first
    same = [torch.equal(indices, before[name]) for name, indices in ours.indices.items()]
    assert all(same) if refresh == 0 else not all(same)
    trained = model(**batch).logits
    records.attach(model, ours.records())
    found = records.of(model)[QUERY]
    assert torch.equal(found.lut.half().float(), found.lut)
    torch.testing.assert_close(model(**batch).logits, trained, atol=0.02, rtol=0.02)


def test_only_the_tables_move_what_is_palettized():
    model = tiny("bert")
    ours = trainer(model)
    opt = optimizer(model, ours)
    start = ours.records()[QUERY]
    train(model, ours, 3, opt=opt)
    found = ours.records()[QUERY]
    assert torch.equal(found.indices, start.indices) and not torch.equal(found.lut, start.lut)
    shown = Palettized(found.indices, ours.tables[QUERY].detach(), found.rows_per_group, None, found.bits).dense()
    assert torch.equal(model.get_parameter(QUERY), shown)


@pytest.mark.parametrize("refresh", [0, 2])
def test_a_stopped_training_continues_bit_for_bit(refresh):
    through = tiny("bert")
    ours = trainer(through, refresh)
    train(through, ours, 7, opt=optimizer(through, ours))

    model = tiny("bert")
    first = trainer(model, refresh)
    opt = train(model, first, 3, opt=optimizer(model, first))
    state = {name: t.clone() for name, t in first.state_dict().items()}
    weights, momentum = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())

    resumed = tiny("bert", seed=5)
    resumed.load_state_dict(tiny("bert").state_dict())
    second = trainer(resumed, refresh)
    resumed.load_state_dict(weights)
    opt = optimizer(resumed, second)
    opt.load_state_dict(momentum)
    second.load_state_dict(state)
    train(resumed, second, 4, start=3, opt=opt)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters()))
    assert all(torch.equal(ours.tables[n], second.tables[n]) for n in ours.tables)
    assert all(torch.equal(ours.indices[n], second.indices[n]) for n in ours.indices)
    assert ours.logs() == second.logs()


@pytest.mark.parametrize("dim", [1, 3])
def test_nearest(dim):
    values, table = torch.randn(2, 50, dim), torch.randn(2, 8, dim)
    distance = (values[:, :, None] - table[:, None]).square().sum(3)
    assert torch.equal(nearest(values, table).long(), distance.argmin(2))


def test_a_tied_weight_trains_one_table():
    model = tiny("opt")
    ours = trainer(model, bits=4, granularity="tensor")
    assert [name for name in ours.tables if "embed_tokens" in name or "lm_head" in name] == [
        "model.decoder.embed_tokens.weight"
    ]
    batch = inputs("opt", labels=True)
    opt = optimizer(model, ours)
    first = model(**batch).loss.item()
    for step in range(5):
        opt.zero_grad()
        model(**batch).loss.backward()
        ours.gradients(True)
        opt.step()
        ours.updated(step + 1)
    assert model(**batch).loss.item() < first
    records.attach(model, ours.records())
    assert torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)


@pytest.mark.parametrize("refresh", [0, 2])
def test_half_precision_training_follows_that_in_fp32(tmp_path, refresh):
    def tables(precision):
        model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        ours = trainer(model, refresh, lr=1e-3)
        asked = arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, precision=precision)
        run = Trainer(model, asked, train_dataset=OfInputs("bert"), compressors=[ours])
        run.train()
        run.release()
        records.attach(model, ours.records())
        assert model.dtype == torch.float32 and set(records.of(model)) >= set(ours.tables)
        assert not torch.equal(model.bert.embeddings.LayerNorm.weight, start["bert.embeddings.LayerNorm.weight"])
        return {name: table.detach() for name, table in ours.tables.items()}, ours.indices

    (full, where), (half, there) = tables("fp32"), tables("bf16-master")
    for name, table in full.items():
        assert (table - half[name]).abs().mean() < 2e-3, name
    if refresh == 0:
        assert all(torch.equal(where[name], there[name]) for name in where)
