import pytest
import torch
from kit.structures import keep
from kit.tiny_models import FAMILIES, RELATIVES, inputs, logits, tiny

from mptrain.compress.prune.masked import MaskedWeights
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink, slices_of
from mptrain.core.errors import ModelError


def some_kept(structure):
    """Uneven: layer 1 keeps all its heads, every third channel stays, one layer keeps its FFN."""
    heads = {i: list(range(b.units))[1::2] for i, b in enumerate(structure.of_kind("heads")) if i != 1}
    ffn = {i: list(range(0, b.units, 3)) for i, b in enumerate(structure.of_kind("ffn")) if i != 0}
    return keep(structure, heads, ffn)


def mask(model, structure, kept):
    """Zero the output columns of everything that is not kept."""
    masks = {}
    for block in structure:
        alive = torch.zeros(block.units, dtype=torch.bool)
        alive[kept.of(block)] = True
        (axis,) = block.sinks
        masks[axis.parameter] = alive.repeat_interleave(axis.per_unit)[None]
    masked = MaskedWeights({name: model.get_parameter(name) for name in masks})
    masked.apply(masks)
    return masked


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_shrunk_is_masked(family, attn):
    model = tiny(family, attn)
    structure = find_structure(model)
    kept = some_kept(structure)
    batch = inputs(family)
    dense = logits(model, batch)
    masked = mask(model, structure, kept)
    expected = logits(model, batch)
    masked.restore()
    assert torch.equal(logits(model, batch), dense)

    before = sum(p.numel() for p in model.parameters())
    assert shrink(model, structure, kept) is model
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    assert (expected - dense).abs().max() > 1e-3  # the units mattered
    assert sum(p.numel() for p in model.parameters()) < before


@pytest.mark.parametrize("family", FAMILIES)
def test_shrinking_again_composes(family):
    once, twice = tiny(family), tiny(family)
    structure = find_structure(once)
    width = structure.of_kind("ffn")[0].units
    shrink(once, structure, keep(structure, {0: [1]}, {0: [2, 5]}))
    shrink(twice, structure, keep(structure, {0: [0, 1]}, {0: list(range(1, width, 1))}))
    shrink(twice, found := find_structure(twice), keep(found, {0: [1]}, {0: [1, 4]}))
    assert once.config.mptrain_structure == twice.config.mptrain_structure
    assert once.config.mptrain_structure["blocks"][structure.of_kind("ffn")[0].name]["units"] == 2
    assert torch.equal(logits(once, inputs(family)), logits(twice, inputs(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_trains(family):
    model = tiny(family)
    structure = find_structure(model)
    shrink(model, structure, some_kept(structure)).train()
    model(**inputs(family, labels=True)).loss.backward()
    for block in find_structure(model):
        assert model.get_parameter(block.sinks[0].parameter).grad.abs().sum() > 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_generate_with_different_heads_per_layer(family, cache):
    model = tiny(family)
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1]}, {1: [3, 4]}))
    ids = inputs(family)["input_ids"]
    made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, cache_implementation=cache)
    for end in range(ids.shape[1], made.shape[1]):  # the cache gives what a whole forward pass gives
        assert torch.equal(logits(model, {"input_ids": made[:, :end]})[:, -1].argmax(-1), made[:, end])


def test_attributes_and_slices():
    model = tiny("bert")
    structure = find_structure(model)
    kept = keep(structure, {1: [0, 3]}, {0: [7, 9]})
    slices = slices_of(structure, kept)
    attention = "bert.encoder.layer.1.attention"
    heads = [*range(8), *range(24, 32)]
    found = {name: {dim: stays.tolist() for dim, stays in by_dim.items()} for name, by_dim in slices.items()}
    assert found[f"{attention}.self.query.weight"] == found[f"{attention}.self.query.bias"] == {0: heads}
    assert found[f"{attention}.output.dense.weight"] == {1: heads}
    assert found["bert.encoder.layer.0.intermediate.dense.weight"] == {0: [7, 9]}
    assert found["bert.encoder.layer.0.output.dense.weight"] == {1: [7, 9]}
    assert len(found) == 10  # q, k, v, fc_in with biases, and two sinks

    query = model.bert.encoder.layer[1].attention.self.query
    weight, bias = query.weight.detach().clone(), query.bias.detach().clone()
    shrink(model, structure, kept)
    assert model.bert.encoder.layer[1].attention.self.query is query
    assert torch.equal(query.weight, weight[heads]) and torch.equal(query.bias, bias[heads])
    assert (query.out_features, query.in_features) == (16, 32)
    module = model.bert.encoder.layer[1].attention.self
    assert (module.num_attention_heads, module.all_head_size) == (2, 16)
    kind = {"kind": "heads", "units": 2, "of": 4}
    assert model.config.mptrain_structure["blocks"]["bert.encoder.layer.1.attention"] == kind
    assert model.config.mptrain_structure["tensors"][f"{attention}.self.query.weight"] == [16, 32]


def test_swin_bias_table_and_llama_groups():
    swin = tiny("swin")
    structure = find_structure(swin)
    module = swin.swin.encoder.layers[1].blocks[0].attention.self
    table = module.relative_position_bias_table.detach().clone()
    shrink(swin, structure, keep(structure, {2: [1, 3]}))
    assert torch.equal(module.relative_position_bias_table, table[:, [1, 3]])

    structure = find_structure(tiny("llama"))
    slices = slices_of(structure, keep(structure, {0: [1]}))
    assert slices["model.layers.0.self_attn.q_proj.weight"][0].tolist() == list(range(16, 32))
    assert slices["model.layers.0.self_attn.k_proj.weight"][0].tolist() == list(range(8, 16))
    assert slices["model.layers.0.self_attn.o_proj.weight"][1].tolist() == list(range(16, 32))


def test_keeps_dtype_frozen_and_random_state():
    model = tiny("bert").to(torch.bfloat16)
    model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    structure = find_structure(model)
    before = torch.get_rng_state()
    shrink(model, structure, keep(structure, {0: [0]}, {0: [1]}))
    assert torch.equal(torch.get_rng_state(), before)
    first = model.bert.encoder.layer[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not first.intermediate.dense.weight.requires_grad
    assert first.output.dense.weight.requires_grad


def test_whole_blocks_are_left_alone():
    model = tiny("bert")
    structure = find_structure(model)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    shrink(model, structure, keep(structure, {0: [0, 1, 2, 3]}, {0: list(range(48))}))
    assert model.bert.encoder.layer[0].intermediate.dense.weight is weight


def test_refuses_quantized_tied_and_wrong():
    model = tiny("bert")
    structure = find_structure(model)
    with pytest.raises(ModelError, match="ascending"):
        shrink(model, structure, keep(structure, {0: [9]}))
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    with pytest.raises(ModelError, match="shares its weight"):
        shrink(model, structure, keep(structure, ffn={0: [1]}))
    model.add_module("__nncf_hooks", torch.nn.Module())
    with pytest.raises(ModelError, match="detach"):
        shrink(model, structure, keep(structure, ffn={0: [1]}))
