"""Palettization of models: which weights, which tables, and what they cost."""

import pytest
import torch
from kit.structures import keep
from kit.tiny_models import FAMILIES, inputs, logits, tiny
from torch import nn

from mptrain.compress.calibrate.fisher_information import fisher
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.compress.weights import records
from mptrain.compress.weights.kmeans import cluster
from mptrain.compress.weights.palettize import palettize, palettized, tables
from mptrain.compress.weights.vector_kmeans import cluster_vectors
from mptrain.core.errors import ModelError, UserError
from mptrain.models import artifact
from mptrain.recipe import Palettize


def config(method="kmeans", **changes):
    return Palettize.model_validate({"method": method} | changes)


def batches(family="bert", count=3):
    return [inputs(family, labels=True, seed=i) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_palettized_and_runs(family):
    model = tiny(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = palettize(model, config("skm", bits=6, group_size=8), batches(family))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the model is not changed"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    exact = logits(model, inputs(family))
    records.attach(model, found)
    assert set(records.distinct(records.of(model))) == set(found)
    difference = (logits(model, inputs(family)) - exact).abs().max()
    assert 0 < float(difference) < 0.3 * float(exact.abs().max())


def test_tables_hold_the_k_means_of_their_rows():
    model = tiny("bert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    record = palettize(model, config(bits=3, group_size=16))[name]
    weight = model.get_parameter(name).detach()  # [48, 32]
    lut, indices = cluster(weight.reshape(3, -1), 3)
    assert record.lut.shape == (3, 8, 1) and record.rows_per_group == 16
    assert torch.equal(record.indices, indices.view(48, 32))
    assert torch.equal(record.lut[..., 0], lut.half().float())


def test_more_bits_and_smaller_groups_come_closer():
    model = tiny("bert")

    def error(**changes):
        found = palettize(model, config(**changes))
        return sum(
            float((r.dense() - model.get_parameter(n).detach().flatten(1)).square().sum()) for n, r in found.items()
        )

    by_bits = [error(bits=b) for b in (1, 2, 3, 4, 6)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(bits=2, group_size=4) < error(bits=2) < error(bits=2, granularity="tensor")


def test_fisher_is_the_sum_of_squared_gradients_tied_weights_once():
    model = tiny("opt")  # lm_head is tied to the embedding
    name = "model.decoder.embed_tokens.weight"
    found = fisher(model.train(), batches("opt"), [name])
    assert model.training
    expected = torch.zeros_like(model.get_parameter(name))
    model.eval()
    for batch in batches("opt"):
        model.zero_grad()
        model(**batch).loss.backward()
        expected += model.get_parameter(name).grad.square()
    torch.testing.assert_close(found[name], expected)


def test_fisher_leaves_gradients_and_flags_as_they_were():
    model = tiny("bert")
    kept = torch.ones_like(model.classifier.bias)
    model.classifier.bias.grad = kept
    model.classifier.weight.requires_grad_(False)
    fisher(model, batches(), ["classifier.weight"])
    assert model.classifier.bias.grad is kept and model.classifier.weight.grad is None
    assert not model.classifier.weight.requires_grad and model.bert.pooler.dense.weight.requires_grad


def test_sensitive_k_means_loses_less_of_what_the_loss_minds():
    model = tiny("bert")
    sensitivity = fisher(model, batches(), tables(model, config(bits=2)))

    def cost(method):
        found = palettize(model, config(method, bits=2), batches())
        errors = {n: (r.dense() - model.get_parameter(n)).square() for n, r in found.items()}
        return sum(float((sensitivity[n] * e.detach()).sum()) for n, e in errors.items())

    assert cost("skm") < 0.9 * cost("kmeans")


def test_a_tied_weight_has_one_record_and_follows_the_choice_for_embeddings():
    model = tiny("opt")
    found = palettize(model, config(embeddings=6, lm_head=False, bits=4))
    assert found["model.decoder.embed_tokens.weight"].bits == 6 and "lm_head.weight" not in found
    records.attach(model, found)
    assert torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)
    assert "model.decoder.embed_tokens.weight" not in palettize(tiny("opt"), config(embeddings=False))


def test_embeddings_and_lm_head_by_choice():
    model = tiny("llama", tie_word_embeddings=False)
    bits = {n: r.bits for n, r in palettize(model, config(embeddings=False, lm_head=6)).items()}
    assert "model.embed_tokens.weight" not in bits and bits["lm_head.weight"] == 6
    assert bits["model.layers.0.mlp.up_proj.weight"] == 4
    assert "lm_head.weight" not in palettize(model, config(lm_head=False))


def test_overrides_by_pattern_the_later_one_wins_and_patterns_must_match():
    model = tiny("bert")
    changes = {"encoder.layer.1": {"bits": 6}, "re:layer.1.*query": {"bits": 8, "granularity": "tensor"}}
    found = tables(model, config(overrides=changes, ignore=["classifier"]))
    assert {t.bits for n, t in found.items() if "layer.0" in n} == {4}
    query = found["bert.encoder.layer.1.attention.self.query.weight"]
    assert (query.bits, query.rows_per_group) == (8, 32)
    assert found["bert.encoder.layer.1.attention.self.key.weight"].bits == 6
    assert "classifier.weight" not in found
    with pytest.raises(UserError, match=r"palettize\.overrides: 'layer\.7' matches no module"):
        tables(model, config(overrides={"layer.7": {"bits": 2}}))
    with pytest.raises(UserError, match=r"'bert.encoder.layer.0.output.LayerNorm' matches no Linear"):
        tables(model, config(overrides={"bert.encoder.layer.0.output.LayerNorm": {"bits": 2}}))
    with pytest.raises(UserError, match=r"palettize\.ignore: 'pooling'"):
        tables(model, config(ignore=["pooling"]))


def test_channels_that_group_size_does_not_divide(caplog):
    caplog.set_level("INFO")
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 62), nn.Linear(62, 5))
    found = tables(model, config(group_size=16))
    assert [t.rows_per_group for t in found.values()] == [15, 62, 5]
    assert "60 channels make no groups of 16; groups of 15 instead" in caplog.text
    assert "62 channels make no groups of 16; one table for the tensor instead" in caplog.text


def test_a_weight_that_would_not_become_smaller_stays():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    assert list(tables(model, config(bits=7))) == ["0.weight"]
    with pytest.raises(UserError, match="no weight is left"):
        tables(model[1:], config(bits=7))


@pytest.mark.parametrize("changes", [{}, {"per_channel_scale": True}, {"cluster_dim": 4, "bits": 6}, {"bits": 1}])
def test_predicted_bytes_are_the_stored_ones(changes):
    model = tiny("bert")
    predicted = tables(model, config(**changes))
    for name, record in palettize(model, config(**changes)).items():
        assert records.stored_bytes(record) == predicted[name].stored_bytes


@pytest.mark.parametrize("method", ["kmeans", "skm"])
def test_per_channel_scale_helps_channels_of_different_size(method):
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 0, 64)[:, None])
        model[0].weight[3] = 0
    data = [{"input": torch.randn(8, 64)} for _ in range(2)]
    errors = {}
    for scaled in (False, True):
        chosen = config(method, bits=3, granularity="tensor", per_channel_scale=scaled)
        record = palettize(model, chosen, data, loss_fn=lambda m, b: m(b["input"]).square().mean())["0.weight"]
        assert (record.per_channel_scale is not None) == scaled
        weight = model[0].weight.detach()
        squares = (record.dense() - weight).square().sum(1)
        errors[scaled] = float((squares / weight.square().sum(1))[weight.any(1)].mean())
    assert errors[True] < 0.3 * errors[False]
    assert float(squares[3]) < 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_are_clustered_as_well_as_scikit_learn_does(weighted):
    from sklearn.cluster import KMeans

    values = torch.randn(2, 3000, 4)
    weights = torch.rand(2, 3000, 1).pow(3).expand(2, 3000, 4) if weighted else None
    table, indices = cluster_vectors(values, 5, weights)
    for g in range(2):
        w = torch.ones(3000) if weights is None else weights[g, :, 0]
        best = KMeans(32, n_init=3, random_state=0).fit(values[g].double().numpy(), sample_weight=w.double().numpy())
        errors = (values[g] - table[g][indices[g].long()]).square().sum(1)
        assert float((w * errors).sum()) < 1.03 * best.inertia_
    again = cluster_vectors(values, 5, weights)
    assert torch.equal(table, again[0]) and torch.equal(indices, again[1])


def test_each_number_of_a_vector_has_its_own_importance():
    values = torch.randn(1, 2000, 2)
    weights = torch.tensor([1.0, 1e-4]).expand_as(values)
    table, indices = cluster_vectors(values, 4, weights)
    plain, nearest = cluster_vectors(values, 4)
    first = [
        float((values[0, :, 0] - t[0][i[0].long()][:, 0]).square().mean())
        for t, i in ((table, indices), (plain, nearest))
    ]
    assert first[0] < 0.2 * first[1]


def test_vectors_with_few_distinct_values_and_zero_importance():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])[torch.randint(3, (1, 100))]
    table, indices = cluster_vectors(values, 3, torch.zeros_like(values))
    assert torch.equal(table[0][indices[0].long()], values[0])


def test_vector_records():
    model = tiny("bert")
    found = palettize(model, config(bits=6, cluster_dim=2, granularity="tensor"))
    record = found["bert.encoder.layer.0.intermediate.dense.weight"]
    assert record.indices.shape == (48, 16) and record.lut.shape == (1, 64, 2)
    with pytest.raises(UserError, match=r"cluster_dim: 5 does not divide the 32 inputs of"):
        palettize(model, config(cluster_dim=5))


def test_tables_are_fp16_numbers_unless_that_costs_precision():
    weight = torch.randn(64, 64)
    table = next(iter(tables(nn.Sequential(nn.Linear(64, 64)), config()).values()))
    near = palettized("w", weight, table)
    assert torch.equal(near.lut.half().float(), near.lut)
    far = palettized("w", 1 + 1e-4 * weight, table)
    assert float((far.dense() - 1 - 1e-4 * weight).abs().max()) < 1e-4
    huge = palettized("w", 1e6 * weight, table)
    assert bool(huge.dense().isfinite().all())


def test_errors_name_the_weight_or_the_field():
    model = tiny("bert")
    with pytest.raises(UserError, match=r"palettize\.method skm needs calibration data"):
        palettize(model, config("skm"))
    with pytest.raises(UserError, match="gave no batch"):
        palettize(model, config("skm"), [])
    with pytest.raises(UserError, match="have no labels"):
        palettize(model, config("skm"), [inputs("bert")])
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"classifier\.weight cannot be palettized: values must be finite: 1 of"):
        palettize(model, config())


def test_a_pruned_model_is_palettized_and_kept_on_disk(tmp_path):
    model = tiny("bert")
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1, 2]}, {0: list(range(10)), 1: list(range(32))}))
    records.attach(model, palettize(model, config("skm", bits=4, group_size=8), batches()))
    artifact.save(model, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded, inputs("bert")), logits(model, inputs("bert")))
    for name, record in records.of(model).items():
        again = records.of(loaded)[name]
        assert torch.equal(again.indices, record.indices) and torch.equal(again.lut, record.lut)


def test_the_same_input_gives_the_same_records():
    first, second = (palettize(tiny("bert"), config("skm", bits=3), batches()) for _ in range(2))
    assert all(torch.equal(first[n].indices, second[n].indices) for n in first)
    assert all(torch.equal(first[n].lut, second[n].lut) for n in first)
