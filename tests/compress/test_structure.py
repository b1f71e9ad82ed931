import pytest
import torch
import transformers as t
from kit.tiny_models import FAMILIES, inputs, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mptrain.compress.structure.blocks import Kept, check_not_shared, counts, find_structure, kept_from_counts
from mptrain.compress.structure.costs import Extent, describe, layer_costs, measure_extents
from mptrain.core.errors import ModelError, UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_layer_of_a_family(family):
    model = tiny(family)
    structure = find_structure(model)
    assert structure.family == family
    assert len(structure.attention) == len(structure.ffn) == (3 if family == "swin" else 2)
    for a in structure.attention:
        q, k, v, o = (model.get_submodule(name) for name in a.linears)
        assert q.weight.shape == (a.heads * a.head_dim, a.hidden)
        assert k.weight.shape == v.weight.shape == (a.kv_heads * a.head_dim, a.hidden)
        assert o.weight.shape == (a.hidden, a.heads * a.head_dim)
        assert a.units * a.columns == o.in_features
    for f in structure.ffn:
        assert model.get_submodule(f.fc_out).in_features == f.width
        assert all(model.get_submodule(name).out_features == f.width for name in f.fc_in)
    assert [a.index for a in structure.attention] == list(range(len(structure.attention)))


def test_a_key_value_group_is_one_unit():
    (first, _) = find_structure(tiny("llama")).attention
    assert (first.heads, first.kv_heads, first.group, first.units, first.head_dim) == (4, 2, 2, 2, 8)


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
    model = tiny(family, cls=cls)
    structure = find_structure(model)
    assert len(structure.attention) == 2
    assert all(isinstance(model.get_submodule(n), nn.Linear) for _, b in structure.blocks() for n in b.linears)


def test_ignore_marks_blocks():
    model = tiny("bert")
    structure = find_structure(model, ignore=["encoder.layer.1", "embeddings", r"re:layer\.0\.intermediate"])
    assert [a.prunable for a in structure.attention] == [True, False]
    assert [f.prunable for f in structure.ffn] == [False, False]
    assert [block.layer for _, block in structure.prunable()] == ["bert.encoder.layer.0"]


@pytest.mark.parametrize("pattern", ["decoder", "re:layer[", "re:layer\\.7"])
def test_a_pattern_without_a_match_is_an_error(pattern):
    with pytest.raises(UserError, match=r"prune\.ignore"):
        find_structure(tiny("bert"), ignore=[pattern])


def test_no_attention():
    with pytest.raises(ModelError, match="bert, roberta, swin"):
        find_structure(nn.Sequential(nn.Linear(2, 2)))


def test_a_replaced_linear_is_named():
    model = tiny("bert")
    model.bert.encoder.layer[1].intermediate.dense = nn.Bilinear(2, 2, 2)
    with pytest.raises(ModelError, match=r"layer\.1\.intermediate\.dense should be an nn\.Linear.*found Bilinear"):
        find_structure(model)


def test_shared_weights_are_refused():
    model = tiny("bert")
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    structure = find_structure(model)
    names = [name for _, block in structure.blocks() for name in block.linears]
    with pytest.raises(ModelError, match=r"shares its weight with bert\.encoder\.layer\.1\.intermediate\.dense"):
        check_not_shared(model, names)
    check_not_shared(tiny("opt"), [n for _, b in find_structure(tiny("opt")).blocks() for n in b.linears])


# -- kept


def test_kept_json_round_trip():
    kept = Kept({0: [1, 3]}, {0: [0], 1: [2, 5]})
    assert Kept.from_json(kept.to_json()) == kept


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"heads": {}},
        {"heads": {"0": 3}, "ffn": {}},
        {"heads": {"a": [1]}, "ffn": {}},
        {"heads": {"0": [1.0]}, "ffn": {}},
        {"heads": {"0": [True]}, "ffn": {}},
        {"heads": {"0": ["1"]}, "ffn": {}},
    ],
)
def test_kept_from_bad_json(data):
    with pytest.raises(ModelError, match="kept units"):
        Kept.from_json(data)


@pytest.mark.parametrize(
    "kept",
    [
        Kept({0: []}),
        Kept({0: [4]}),
        Kept({0: [-1]}),
        Kept({0: [1, 0]}),
        Kept({0: [1, 1]}),
        Kept({2: [0]}),
        Kept(ffn={0: [48]}),
    ],
)
def test_kept_that_does_not_fit(kept):
    with pytest.raises(ModelError, match="kept"):
        kept.check(find_structure(tiny("bert")))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.update(family="opt"),
        lambda d: d.update(layers=[]),
        lambda d: d["layers"].pop("1"),
        lambda d: d["layers"].update({"7": {"heads": 1, "ffn": 1}}),
        lambda d: d["layers"].update({"1": 3}),
        lambda d: d["layers"]["0"].update(heads=0),
        lambda d: d["layers"]["0"].update(heads=5),
        lambda d: d["layers"]["0"].update(heads=True),
        lambda d: d["layers"]["0"].update(ffn="48"),
        lambda d: d["layers"]["0"].update(ffn=-1),
        lambda d: d["layers"]["0"].update(ffn=10**30),
        lambda d: d["layers"]["0"].pop("ffn"),
    ],
)
def test_counts_that_do_not_fit(change):
    structure = find_structure(tiny("bert"))
    data = counts(structure)
    assert kept_from_counts(data, structure) == Kept()
    change(data)
    with pytest.raises(ModelError, match="mptrain_structure"):
        kept_from_counts(data, structure)


@pytest.mark.parametrize("data", [None, 3, "x", []])
def test_counts_of_a_wrong_type(data):
    with pytest.raises(ModelError, match="mptrain_structure"):
        kept_from_counts(data, find_structure(tiny("bert")))


# -- costs


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_params_are_the_params_of_the_linears(family):
    model = tiny(family)
    structure = find_structure(model)
    for a, f, row in zip(structure.attention, structure.ffn, layer_costs(structure, 9)):
        linears = [model.get_submodule(name) for name in (*a.linears, *f.linears)]
        expected = sum(p.numel() for m in linears for p in m.parameters())
        if family == "swin":
            expected += model.get_submodule(a.module).relative_position_bias_table.numel()
        assert row["params"] == expected
        assert (row["heads"], row["ffn"], row["layer"]) == (a.heads, f.width, a.layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_macs_are_what_torch_counts(family):
    model = tiny(family, "eager")
    structure = find_structure(model)
    example = inputs(family, batch=2)
    extents = measure_extents(model, structure, example)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example)
    counted = counter.get_flop_counts()
    for row in layer_costs(structure, extents):
        name = f"{type(model).__name__}.{row['layer']}"
        assert row["macs"] * 2 * 2 == sum(counted[name].values())  # 2 flops a MAC, 2 examples


def test_extents():
    model = tiny("swin")
    structure = find_structure(model)
    found = measure_extents(model, structure, inputs("swin"))
    assert found == {0: Extent(64, 16), 1: Extent(64, 16), 2: Extent(16, 16)}  # windows of 4×4, then patches merged


def test_describe_lists_query_heads():
    structure = find_structure(tiny("llama"))
    found = describe(structure, Kept({0: [1]}, {1: [0, 2, 5]}))
    first, second = found["layers"]
    assert found["family"] == "llama"
    assert (first["heads"], first["heads_total"], first["ffn"], first["ffn_total"]) == ([2, 3], 4, 48, 48)
    assert (second["heads"], second["ffn"]) == ([0, 1, 2, 3], 3)
    # a unit: 2 query, 1 key, 1 value and 2 output heads of 8 × 32; a channel: gate, up, down
    assert first["params_total"] - first["params"] == 8 * 32 * 6
    assert second["params_total"] - second["params"] == 45 * 3 * 32
