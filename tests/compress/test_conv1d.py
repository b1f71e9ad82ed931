"""Layers that hold their weight transposed (GPT-2's Conv1D) are compressed as Linears are, and what is left is said."""

import copy

import pytest
import torch
import transformers
from kit.tiny import jpqd as tiny_recipe
from kit.tiny_models import inputs, logits
from kit.tiny_models import tiny as model_of
from torch import nn
from transformers.pytorch_utils import Conv1D

import mptrain
from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.integers import records_from_quantizers
from mptrain.compress.weights import palettize, records, weight_only
from mptrain.compress.weights.coverage import coverage
from mptrain.compress.weights.table_training import TableTrainer
from mptrain.core.errors import ModelError, UserError
from mptrain.recipe import Palettize, Ptq, TableTraining, WeightOnly
from mptrain.recipe import file as recipe_file

METHODS = {
    "rtn blocks": WeightOnly(mode="weight_only", method="rtn", block_size=16),
    "scale asymmetric": WeightOnly(mode="weight_only", method="scale", symmetric=False),
    "gptq": WeightOnly(mode="weight_only", method="gptq", block_size=8),
    "int8 channel": WeightOnly(mode="weight_only", method="rtn", bits=8, granularity="channel"),
    "budget": WeightOnly(mode="weight_only", method="rtn", size_budget=6.0),
    "tables": Palettize(method="kmeans", bits=3, group_size=8),
    "vectors": Palettize(method="kmeans", bits=4, cluster_dim=2, granularity="tensor"),
    "scaled tables": Palettize(method="skm", bits=4, granularity="tensor", per_channel_scale=True),
    "table budget": Palettize(method="kmeans", size_budget=4.0, granularity="tensor"),
}


def as_linear(model):
    """The same model with a Linear for each Conv1D."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, linear)
    return model


def compress(model, config):
    batches = [inputs("gpt2", labels=True, seed=seed) for seed in range(2)]
    plain = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    if isinstance(config, WeightOnly):
        weight_only.compress(model, config, plain, batches)
    else:
        records.attach(model, palettize.palettize(model, config, batches))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_conv1d_is_compressed_as_a_linear_of_the_same_weights(method):
    model = model_of("gpt2")
    ours, expected = compress(model, METHODS[method]), compress(as_linear(model_of("gpt2")), METHODS[method])
    found, wanted = records.of(ours), records.of(expected)
    assert found.keys() == wanted.keys() and coverage(ours, found).share > 0.95
    for name, record in found.items():
        held_in_columns = ".c_" in name
        assert record.transposed == held_in_columns
        torch.testing.assert_close(record.dense(), wanted[name].dense(), rtol=0, atol=1e-6)
        assert torch.equal(record.weight(), record.dense().T if held_in_columns else record.dense())
    torch.testing.assert_close(logits(ours, inputs("gpt2")), logits(expected, inputs("gpt2")), rtol=0, atol=1e-5)


def test_transposed_records_survive_the_disk(tmp_path):
    model = compress(model_of("gpt2"), METHODS["tables"])
    mptrain.save(model, tmp_path / "m")
    again = mptrain.load(tmp_path / "m")
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))
    first, second = records.of(model), records.of(again)
    assert [r.transposed for r in first.values()] == [r.transposed for r in second.values()]
    name = next(n for n in first if "c_attn" in n)
    wrong = records.Palettized(first[name].indices.T.contiguous(), first[name].lut[:4], 8, None, 3, True)
    with pytest.raises(ModelError, match=r"c_attn.weight is \(32, 96\), its record is for \(32, 96\), transposed"):
        records.attach(model_of("gpt2"), {name: wrong})


def test_tables_of_a_conv1d_are_trained():
    """Gradients of entries, and new assignments, are those of a Linear with the same weights."""
    trainers = []
    for model in (model_of("gpt2"), as_linear(model_of("gpt2"))):
        found = palettize.palettize(model, METHODS["tables"])
        trainer = TableTrainer(found, TableTraining(refresh=1), lr=0.01)
        trainer.prepare(model)
        model(**inputs("gpt2", labels=True)).loss.backward()
        trainer.gradients(True)
        for table in trainer.tables.values():
            table.grad, _ = None, table.data.sub_(0.1 * table.grad)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad if parameter.grad is not None else 0.0)
        trainer.updated(1)
        trainers.append(trainer)
    ours, expected = (trainer.records() for trainer in trainers)
    for name, record in ours.items():
        torch.testing.assert_close(record.lut, expected[name].lut, rtol=0, atol=2e-3)
        assert (record.indices != expected[name].indices).float().mean() < 0.01


def test_the_integers_of_its_fake_quantizers_are_stored():
    model = quantizers.quantize(model_of("gpt2"), Ptq(mode="ptq"), [inputs("gpt2", seed=i) for i in range(2)])
    found = records_from_quantizers(model)
    assert len([name for name in found if ".c_" in name]) == 8
    for quantizer in (q for q in model.modules() if isinstance(q, FakeQuantizer) and q.weight_of):
        name = f"{quantizer.weight_of}.weight"
        with torch.no_grad():
            assert torch.equal(found[name].weight(), quantizer(model.get_parameter(name)))


# -- what is left


class Fused(nn.Module):
    """Two experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 32, 64))


def partly():
    return nn.Sequential(nn.Linear(32, 32, bias=False), Fused(), nn.LayerNorm(32))


@pytest.mark.parametrize("config", [METHODS["rtn blocks"], METHODS["tables"]])
def test_less_than_half_is_an_error_unless_it_is_meant(config, caplog):
    field = "quantize" if isinstance(config, WeightOnly) else "palettize"
    said = (
        rf"{field}: covers only 19.8% of the parameters; left in floating point: Fused.experts 79.0%, LayerNorm.weight"
    )
    with pytest.raises(UserError, match=said):
        compress(partly(), config)
    caplog.set_level("INFO", "mptrain")
    compress(partly(), config.model_copy(update={"allow_partial": True}))
    assert "19.8% of the parameters; left in floating point: Fused.experts 79.0%" in caplog.text


def test_shared_weights_count_once_and_kinds_are_named():
    found = coverage(model_of("gpt2"), ["transformer.wte.weight"])
    assert found.total == sum(p.numel() for p in model_of("gpt2").parameters())
    assert found.covered == 50 * 32
    assert list(found.left)[:2] == ["Conv1D.weight", "Embedding.weight"]
    assert sum(found.left.values()) + found.covered == found.total
    assert sum(found.facts()["left"].values()) + found.facts()["covered"] == pytest.approx(1)


def test_fused_experts_are_refused_by_name():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=8, vocab_size=40)
    said = r"left in floating point: MixtralExperts.gate_up_proj \d\d.\d%, MixtralExperts.down_proj"
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    with pytest.raises(UserError, match=said):
        weight_only.choices(model, METHODS["rtn blocks"])
    with pytest.raises(UserError, match=said):
        palettize.tables(model, METHODS["tables"])


def test_the_command_line_may_allow_it(tmp_path):
    described = tiny_recipe(tmp_path)
    described["stages"].append({"id": "q", "quantize": {"mode": "weight_only", "block_size": "auto"}})
    described["stages"].append({"id": "p", "from": "dense", "palettize": {"method": "kmeans"}})
    recipe = recipe_file.validate(described, "test")
    allowed = recipe.allowing_partial()
    assert [s.quantize.allow_partial for s in (recipe.stage("q"), allowed.stage("q"))] == [False, True]
    assert allowed.stage("p").palettize.allow_partial and allowed.stage("dense") == recipe.stage("dense")
