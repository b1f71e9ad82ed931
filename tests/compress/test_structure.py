import pytest
import torch
import transformers as t
from kit.structures import keep
from kit.tiny_models import FAMILIES, inputs, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mptrain.compress.base import Site
from mptrain.compress.prune.methods import FisherPruning
from mptrain.compress.structure.blocks import Kept
from mptrain.compress.structure.costs import describe, extent, head_dim, layer_costs, measure_extents
from mptrain.compress.structure.dataflow import finder
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import check_not_shared, shrink
from mptrain.core.errors import ModelError, UserError
from mptrain.recipe.prune import Fisher


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_layer_of_a_family(family):
    model = tiny(family)
    structure = find_structure(model)
    heads, ffn = structure.of_kind("heads"), structure.of_kind("ffn")
    assert len(heads) == len(ffn) == (3 if family == "swin" else 2) == len(structure.layers())
    for block in structure:
        (sink,) = block.sinks
        out = model.get_parameter(sink.parameter)
        assert sink.dim == 1 and out.shape[1] == sink.size == block.units * sink.per_unit
        for axis in block.sources:
            weight = model.get_parameter(axis.parameter)
            assert axis.dim == 0 and weight.shape == (block.units * axis.per_unit, axis.weights)
            assert axis.indices.flatten().tolist() == list(range(axis.size))
        biases = sum(name.endswith("bias") for name in block.parameters)
        assert biases == (0 if family == "llama" else len(block.sources))
    assert [len(b.sources) for b in heads] == [3] * len(heads)
    assert [len(b.sources) for b in ffn] == [2 if family == "llama" else 1] * len(ffn)


def test_a_key_value_group_is_one_unit():
    first, _ = find_structure(tiny("llama")).of_kind("heads")
    assert (first.units, first.heads, head_dim(first)) == (2, 2, 8)
    assert [axis.per_unit for axis in first.axes] == [16, 8, 8, 16]


@pytest.mark.parametrize(
    ("family", "cls"),
    [
        ("bert", t.BertModel),
        ("bert", t.BertForQuestionAnswering),
        ("bert", t.BertForMaskedLM),
        ("roberta", t.RobertaForTokenClassification),
        ("distilbert", t.DistilBertForTokenClassification),
        ("vit", t.ViTModel),
        ("wav2vec2", t.Wav2Vec2ForCTC),
        ("opt", t.OPTForSequenceClassification),
        ("llama", t.LlamaForSequenceClassification),
    ],
)
def test_any_head(family, cls):
    model = tiny(family, cls=cls, num_labels=2)
    structure = find_structure(model)
    assert [b.kind for b in structure] == ["heads", "ffn"] * 2
    owners = [axis.parameter.rpartition(".")[0] for b in structure for axis in (*b.sources, *b.sinks)]
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in owners)


def test_ignore_marks_blocks():
    model = tiny("bert")
    structure = find_structure(model, ignore=["encoder.layer.1", "embeddings", r"re:layer\.0\.intermediate"])
    assert [b.prunable for b in structure] == [True, False, False, False]
    assert [b.name for b in structure.prunable()] == ["bert.encoder.layer.0.attention"]


@pytest.mark.parametrize("pattern", ["decoder", "re:layer[", "re:layer\\.7"])
def test_a_pattern_without_a_match_is_an_error(pattern):
    with pytest.raises(UserError, match=r"prune\.ignore"):
        find_structure(tiny("bert"), ignore=[pattern])


def test_nothing_to_cut():
    with pytest.raises(ModelError, match=r"nothing can be cut out of Sequential"):
        find_structure(nn.Sequential(nn.Linear(2, 2)), {"input": torch.ones(1, 2)})
    with pytest.raises(ModelError, match="without an example"):
        find_structure(nn.Sequential(nn.Linear(2, 3)))


def test_refusals_are_told_with_their_reasons():
    config = t.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match=r"(?s)nothing can be cut out of MambaForCausalLM.*mixer.*low rank"):
        find_structure(t.MambaForCausalLM(config))
    with torch.device("meta"):
        skeleton = t.MambaForCausalLM(config)
    settings = Fisher.model_validate({"method": "fisher", "keep": {"encoder_params": 0.5}})
    with pytest.raises(ModelError, match="nothing can be cut out"):  # before training
        FisherPruning.check(settings, skeleton, Site("stages.small.prune"))


def test_an_architecture_is_looked_at_once(monkeypatch):
    calls = []
    find = finder.find
    monkeypatch.setattr(finder, "find", lambda *args: calls.append(args) or find(*args))
    assert find_structure(tiny("bert", vocab_size=37)) == find_structure(tiny("bert", vocab_size=37, seed=1))
    assert len(calls) == 1
    model = tiny("bert", vocab_size=37)
    shrink(model, structure := find_structure(model), keep(structure, {0: [1]}))
    assert [b.units for b in find_structure(model)] == [1, 48, 4, 48]
    assert len(calls) == 2
    model.bert.register_forward_hook(lambda *_: None)
    find_structure(model)
    assert len(calls) == 3  # what a hook does is not known


def test_shared_weights_are_refused():
    model = tiny("bert")
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    structure = find_structure(model)
    with pytest.raises(ModelError, match=r"shares its weight with bert\.encoder\.layer\.1\.intermediate\.dense"):
        check_not_shared(model, structure)
    check_not_shared(tiny("opt"), find_structure(tiny("opt")))


# -- kept


@pytest.mark.parametrize(
    ("block", "units"),
    [
        ("bert.encoder.layer.0.attention", [4]),
        ("bert.encoder.layer.0.attention", [-1]),
        ("bert.encoder.layer.0.attention", [1, 0]),
        ("bert.encoder.layer.0.attention", [1, 1]),
        ("bert.encoder.layer.2.attention", [0]),
        ("bert.encoder.layer.0.ffn", [48]),
    ],
)
def test_kept_that_does_not_fit(block, units):
    with pytest.raises(ModelError, match="kept"):
        Kept({block: units}).check(find_structure(tiny("bert")))


# -- costs


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_params_are_those_of_its_modules(family):
    model = tiny(family)
    structure = find_structure(model)
    for (layer, blocks), row in zip(structure.layers().items(), layer_costs(structure, 9)):
        whole = {a.parameter.rpartition(".")[0] for b in blocks for a in b.axes}  # Swin's table is beside its Linears
        parameters = [p for name in whole for p in model.get_submodule(name).parameters(recurse=False)]
        assert row["params"] == sum(p.numel() for p in parameters)
        assert (row["heads"], row["ffn"], row["layer"]) == (blocks[0].units * blocks[0].heads, blocks[1].units, layer)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_macs_are_what_torch_counts(family, attn):
    structure = find_structure(tiny(family, attn))
    extents = measure_extents(tiny(family, attn), structure, inputs(family, batch=2))
    model = tiny(family, "eager")  # torch does not count sdpa's kernel for CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs(family, batch=2))
    counted = counter.get_flop_counts()
    for row in layer_costs(structure, extents):
        name = f"{type(model).__name__}.{row['layer']}"
        assert row["macs"] * 2 * 2 == sum(counted[name].values())  # 2 flops a MAC, 2 examples


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_macs_of_a_length_are_those_of_an_example_of_that_length(family):
    structure = find_structure(tiny(family))
    measured = measure_extents(tiny(family), structure, inputs(family))
    assert all(extent(9, block) == measured[block.name] for block in structure)


def test_a_model_without_weights_has_the_same_extents():
    with torch.device("meta"):
        model = t.ViTModel(tiny("vit").config).eval()
    example = inputs("vit")
    structure = find_structure(real := t.ViTModel(tiny("vit").config).eval())
    expected = measure_extents(real, structure, example)
    assert measure_extents(model, structure, {k: v.to("meta") for k, v in example.items()}) == expected


def test_extents():
    model = tiny("swin")
    structure = find_structure(model)
    found = measure_extents(model, structure, inputs("swin"))
    shapes = [(found[b.name].tokens, found[b.name].keys) for b in structure.of_kind("heads")]
    assert shapes == [(64, 16), (64, 16), (16, 16)]  # windows of 4×4, then patches merged


def test_describe_lists_query_heads():
    structure = find_structure(tiny("llama"))
    found = describe(structure, keep(structure, {0: [1]}, {1: [0, 2, 5]}))
    first, second = found["layers"]
    assert found["family"] == "llama"
    assert (first["heads"], first["heads_total"], first["ffn"], first["ffn_total"]) == ([2, 3], 4, 48, 48)
    assert (second["heads"], second["ffn"]) == ([0, 1, 2, 3], 3)
    # a unit: 2 query, 1 key, 1 value and 2 output heads of 8 × 32; a channel: gate, up, down
    assert first["params_total"] - first["params"] == 8 * 32 * 6
    assert second["params_total"] - second["params"] == 45 * 3 * 32
    assert [(b["kind"], b["kept"], b["total"]) for b in found["blocks"]] == [
        ("heads", 1, 2), ("ffn", 48, 48), ("heads", 2, 2), ("ffn", 3, 48)
    ]  # fmt: skip
