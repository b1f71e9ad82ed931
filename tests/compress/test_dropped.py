"""Whole blocks that leave: masked is shrunk is loaded, what cannot leave is said, and what curvature makes of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from kit.dropped import without
from kit.long import except_for
from kit.structures import keep, zero_sinks
from kit.tiny_models import FAMILIES, inputs, logits, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mptrain.compress.base import Site, Tools
from mptrain.compress.boundary import cut
from mptrain.compress.methods import method_class
from mptrain.compress.prune.curvature import CurvaturePruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Kept
from mptrain.compress.structure.budget import Budget
from mptrain.compress.structure.dropped import Constant, Zeros
from mptrain.compress.structure.find import droppable, find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import ModelError, UserError
from mptrain.models import artifact
from mptrain.precision.half import in_half
from mptrain.recipe import Curvature, Keep, Magnitude, Ptq

ALL = [*(family for family in FAMILIES if family != "swin"), "gpt2"]  # swin's attention has a table to each head


def empty(structure, heads, ffn):
    return Kept({structure.of_kind("heads")[heads].name: [], structure.of_kind("ffn")[ffn].name: []})


@pytest.mark.parametrize("attn", except_for(["eager", "sdpa"], ["sdpa"]))
@pytest.mark.parametrize("family", ALL)
def test_dropped_is_masked_is_loaded(family, attn, tmp_path):
    model, batch = tiny(family, attn), inputs(family)
    structure = find_structure(model)
    assert droppable(model, structure) == ([block.name for block in structure.prunable()], [])
    kept = empty(structure, 0, 1)
    kept.units[structure.of_kind("ffn")[0].name] = [1, 3]
    expected = logits(zero_sinks(tiny(family, attn), structure, kept), batch)
    assert (expected - logits(model, batch)).abs().max() > 1e-3
    before = sum(p.numel() for p in model.parameters())
    assert shrink(model, structure, kept) is model
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    gone = sum(costs.params(b, b.units) - costs.params(b, kept.count(b)) for b in structure)
    assert before - sum(p.numel() for p in model.parameters()) == gone
    artifact.save(model, tmp_path / "m")
    loaded = artifact.load(tmp_path / "m")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.config.mptrain_structure == model.config.mptrain_structure
    assert find_structure(loaded) == find_structure(model)
    assert {block.name for block in find_structure(model)} == {b.name for b in structure if not kept.drops(b)}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_loaded_without_mptrain_too(family, tmp_path):
    model = without(tiny(family))
    artifact.save(model, tmp_path / "m")
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    assert torch.equal(logits(loaded, inputs(family)), logits(model, inputs(family)))


@pytest.mark.parametrize("family", except_for(["bert", "opt", "llama"], ["bert", "llama"]))
def test_later_stages_prune_and_train_what_is_left(family):
    once, twice = tiny(family), without(tiny(family))
    structure = find_structure(once)
    kept = empty(structure, 0, 1)
    shrink(once, structure, Kept({**kept.units, structure.of_kind("heads")[1].name: [1]}))
    shrink(twice, found := find_structure(twice), keep(found, {0: [1]}))
    assert once.config.mptrain_structure == twice.config.mptrain_structure
    assert [one["units"] for one in twice.config.mptrain_structure["blocks"].values()].count(0) == 2
    twice.train()(**inputs(family, labels=True)).loss.backward()
    constants = [module for module in twice.modules() if isinstance(module, Constant)]
    assert len(constants) == 2 and all(c.bias.grad.abs().sum() > 0 for c in constants)
    half = in_half(twice.eval(), [], "bf16")
    assert torch.nn.functional.cosine_similarity(
        logits(half, inputs(family)).float().flatten(), logits(twice, inputs(family)).flatten(), 0
    ) > 0.99  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_cache_counts_the_layer_whose_attention_is_gone(family, cache):
    model = without(tiny(family))
    ids = inputs(family)["input_ids"]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "cache_implementation": cache}
    made = model.generate(ids, max_new_tokens=5, **options)
    for end in range(ids.shape[1], made.shape[1]):
        assert torch.equal(logits(model, {"input_ids": made[:, :end]})[:, -1].argmax(-1), made[:, end])


@pytest.mark.parametrize(
    "change",
    [
        lambda modules: modules.clear(),
        lambda modules: modules.update({"bert.nowhere": {"kind": "zeros", "size": 8}}),
        lambda modules: modules.update({"bert.embeddings.LayerNorm": {"kind": "constant", "size": 32}}),
        lambda modules: modules.update({"bert.embeddings.word_embeddings": {"kind": "zeros", "size": 8}}),
        lambda modules: modules.update({QUERY: {"kind": "zeros", "size": 33}}),
        lambda modules: modules.update({QUERY: {"kind": "zeros", "size": 0}}),
        lambda modules: modules.update({QUERY: {"kind": "zeros", "size": True}}),
        lambda modules: modules.update({QUERY: {"kind": "zeros", "size": 10**12}}),
        lambda modules: modules.update({QUERY: {"kind": "os.system", "size": 8}}),
        lambda modules: modules.update({QUERY: {"kind": ["zeros"], "size": 8}}),
        lambda modules: modules.update({QUERY: {"kind": "zeros"}}),
        lambda modules: modules.update({QUERY: 8}),
        lambda modules: modules.update({SINK: {"kind": "constant", "size": 31}}),
    ],
)
def test_a_folder_whose_constants_do_not_fit(change, tmp_path):
    artifact.save(without(tiny("bert")), tmp_path / "m")
    file = tmp_path / "m/config.json"
    config = json.loads(file.read_text())
    change(config["mptrain_structure"]["modules"])
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        artifact.load(tmp_path / "m")
    assert "mptrain_structure.modules" in str(caught.value) or str(tmp_path / "m") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [5, {}, {"kind": "heads"}, {"kind": "heads", "units": "0"}, {"units": 0}])
def test_a_folder_whose_blocks_are_not_described(block, tmp_path):
    artifact.save(without(tiny("bert")), tmp_path / "m")
    file = tmp_path / "m/config.json"
    config = json.loads(file.read_text())
    config["mptrain_structure"]["blocks"]["x"] = block
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mptrain_structure\.blocks\.x must be an object with kind and units"):
        artifact.load(tmp_path / "m")


QUERY = "bert.encoder.layer.0.attention.self.query"
SINK = "bert.encoder.layer.0.attention.output.dense"


def test_poolers_stay_whole_when_all_attentions_are_gone():
    model = tiny("bert")
    structure = find_structure(model)
    assert "poolers" in structure.refused[0].reason
    shrink(model, structure, Kept({block.name: [] for block in structure.of_kind("heads")}))
    found = find_structure(model)
    assert [block.name for block in found] == [block.name for block in structure.of_kind("ffn")]
    assert found.refused == structure.refused


class Adds(nn.Module):
    """Falcon's parallel layer: what an FFN gave is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Reads.Layer(False), Reads.Layer(False)])

    def forward(self, x):
        for layer in self.layers:
            y = layer.down(torch.relu(layer.up(x)))
            y += x
            x = y
        return x


def test_what_a_constant_gives_may_be_written_to():
    model, x = Adds(), torch.randn(3, 8)
    structure = find_structure(model, {"x": x})
    assert droppable(model, structure, {"x": x}) == (["layers.0.ffn", "layers.1.ffn"], [])
    shrink(model, structure, Kept({"layers.0.ffn": []}))
    model.train()(x).sum().backward()
    assert torch.equal(model.layers[0].down.bias.grad.isfinite(), torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(model.layers[0].down(x), model.layers[0].down.bias.detach().expand(3, 8))


# -- what cannot leave


class Reads(nn.Module):
    """A network whose second FFN looks at a weight of its own, which a constant does not have."""

    class Layer(nn.Module):
        def __init__(self, looks: bool) -> None:
            super().__init__()
            self.up, self.down, self.looks = nn.Linear(8, 16), nn.Linear(16, 8), looks

        def forward(self, x):
            y = torch.relu(self.up(x))
            return x + self.down(y.to(self.down.weight.dtype) if self.looks else y)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(False), self.Layer(True)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_that_cannot_leave_are_named_with_the_reason():
    swin = tiny("swin")
    structure = find_structure(swin)
    names, refused = droppable(swin, structure)
    assert names == [block.name for block in structure.of_kind("ffn")]
    assert [one.what for one in refused] == [block.name for block in structure.of_kind("heads")]
    assert all("relative_position_bias_table is of its units too" in one.reason for one in refused)
    with pytest.raises(ModelError, match=r"attention cannot lose all its units: .*relative_position_bias_table"):
        shrink(swin, structure, Kept({structure.of_kind("heads")[0].name: []}))

    torch.manual_seed(0)
    model, example = Reads(), {"x": torch.randn(3, 8)}
    structure = find_structure(model, example)
    names, refused = droppable(model, structure, example)
    assert names == ["layers.0.ffn"] and [one.what for one in refused] == ["layers.1.ffn"]
    assert "AttributeError" in refused[0].reason and "weight" in refused[0].reason
    assert type(model.layers[1].down) is nn.Linear  # the proof leaves the model as it was


def test_something_is_left():
    model = tiny("bert")
    structure = find_structure(model)
    with pytest.raises(ModelError, match="leave no block at all"):
        shrink(model, structure, Kept({block.name: [] for block in structure}))


# -- budgets


def budget(structure, share, *, drop=True, **floors):
    names = frozenset(block.name for block in structure) if drop else frozenset[str]()
    return Budget(structure, Keep(encoder_params=share), **({"min_ffn": 8, "round_ffn": 8} | floors), drop=names)


@pytest.mark.parametrize("share", [0.06, 0.2, 0.45, 0.7])
def test_the_best_choice_among_all_with_whole_blocks_among_them(share):
    structure = find_structure(tiny("bert"))
    draw = np.random.default_rng(0)
    value = {b.name: np.concatenate([[0.0], np.cumsum(draw.random(b.units))]) for b in structure}
    found = budget(structure, share)
    total = sum(costs.params(b, b.units) for b in structure)
    allowed = [found.widths.allowed(b).tolist() for b in structure.by_kind()]
    assert all(counts[0] == 0 for counts in allowed)

    def worth(counts):
        spent = sum(costs.params(b, n) for b, n in zip(structure.by_kind(), counts))
        return sum(value[b.name][n] for b, n in zip(structure.by_kind(), counts)) if spent <= share * total else -1.0

    best = max(worth(counts) for counts in itertools.product(*allowed))
    counts = found.counts(lambda block: value[block.name])
    assert worth([counts[b.name] for b in structure.by_kind()]) == pytest.approx(best, rel=1e-3)
    assert any(counts.values())


def test_costs_of_a_block_that_is_gone():
    structure = find_structure(tiny("bert"))
    heads, ffn = structure.of_kind("heads")[0], structure.of_kind("ffn")[0]
    table = {costs.kind(heads): {"1": 1.0, "4": 2.0}, costs.kind(ffn): {"1": 1.0, "48": 3.0}}
    for block in (heads, ffn):
        assert (costs.params(block, 0), costs.macs(block, 0, 128), costs.latency(block, 0, table)) == (32, 0, 0.0)
    assert costs.params(find_structure(tiny("llama")).blocks[0], 0) == 32  # no bias before, a constant then


def test_a_budget_that_leaves_no_block_is_refused():
    structure = find_structure(tiny("bert"))
    constants = 32 * 4
    least = min(costs.params(b, n) for b, n in [(b, 1 if b.heads else 8) for b in structure]) + constants - 32
    share = least / sum(costs.params(b, b.units) for b in structure)
    importance = {b.name: np.ones(b.units) for b in structure}
    kept = budget(structure, share).search(importance)
    assert sum(not kept.drops(block) for block in structure) == 1
    with pytest.raises(UserError, match=r"keep\.encoder_params: .* cannot be reached.*would leave no block at all"):
        budget(structure, share * 0.99)
    with pytest.raises(UserError, match=r"cannot be reached: with min_heads 1, (?!.*no block)"):
        budget(structure, share, drop=False)


# -- curvature


def pruner(model, keep_, **changes):
    settings = {"method": "curvature", "keep": keep_, "min_ffn": 1, "round_ffn": 1} | changes
    structure = find_structure(model)
    found = CurvaturePruner(
        Curvature.model_validate(settings), structure=structure, phase_steps=0, steps_per_epoch=1,
        drop=frozenset(droppable(model, structure)[0]),
    )  # fmt: skip
    found.prepare(model)
    return found


def plain(family, count=8):
    batches = [inputs(family, batch=8, seed=i) for i in range(count)]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def test_blocks_that_give_a_constant_leave_first_and_nothing_changes():
    model, data = tiny("bert"), plain("bert")
    layers = model.bert.encoder.layer
    with torch.no_grad():
        layers[0].attention.self.value.weight.zero_()  # of all tokens the same: what each attends to is no matter
        layers[1].intermediate.dense.weight.zero_()
        for bias in (layers[0].attention.self.value.bias, layers[1].intermediate.dense.bias):
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    before = [logits(model, batch) for batch in data]
    whole = sum(costs.params(b, b.units) for b in find_structure(model))
    idle = [b for b in find_structure(model) if b.name.endswith(("0.attention", "1.ffn"))]
    share = 1 - sum(costs.params(b, b.units) - costs.params(b, 0) for b in idle) / whole
    ours = pruner(model, {"encoder_params": share}, damping=1e-8)
    ours.look(model, data)
    assert ours.facts()["dropped"] == ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.ffn"]
    assert ours.facts()["loss"] < 1e-6
    model = cut(model, ours)
    assert type(layers[0].attention.self.query) is Zeros and type(layers[1].output.dense) is Constant
    for batch, expected in zip(data, before):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_loss_without_a_block_and_the_constant_are_those_of_its_moments(family):
    """llama's layers have no bias: it gets one."""
    model, data = tiny(family), plain(family)
    ours = pruner(model, {"encoder_params": 0.5})
    ours.look(model, data)
    name, block = next((b.name, b) for b in ours.structure if b.kind == "ffn")
    ((consumer, _, mean),) = ours._moments[name]
    weight = consumer.matrix(model).detach().double().clone()
    bias = getattr(model.get_submodule(consumer.module), "bias", None)
    old = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().clone()
    ours.settle(Kept({name: []}))
    assert ours.facts()["loss"] == pytest.approx(float(ours._removals[name].loss[-1]))
    model = cut(model, ours)
    constant = model.get_submodule(consumer.module)
    torch.testing.assert_close(constant.bias.detach().double(), old + weight @ mean, rtol=1e-5, atol=1e-7)
    assert block.name not in [b.name for b in find_structure(model)]


# -- recipes


def test_who_cannot_drop_says_who_can():
    with pytest.raises(ValueError, match=r"drop: is for method curvature.*take drop out"):
        Magnitude.model_validate({"method": "magnitude", "keep": {"macs": 0.5}, "drop": True})
    assert (
        "whole blocks" in Curvature.model_validate({"method": "curvature", "keep": {"macs": 0.5}, "drop": True}).words()
    )


def test_quantized_models_and_models_without_such_blocks_are_refused():
    config = Curvature.model_validate({"method": "curvature", "keep": {"encoder_params": 0.5}, "drop": True})
    method = method_class(config)
    with pytest.raises(UserError, match=r"prune\.drop: a model that carries quantizers.*prune first"):
        method.check(config, tiny("bert"), Site("prune", length=9, quantized=True))
    quantized = quantizers.quantize(tiny("bert"), Ptq(mode="ptq"), [inputs("bert")])
    with pytest.raises(UserError, match=r"prune\.drop: a model that carries quantizers"):
        method(config).prepare(quantized, Tools(example=lambda: inputs("bert"), inputs=lambda: plain("bert", 1)))
    only = config.model_copy(update={"ignore": ["intermediate", "output", "re:mlp"]})
    swin = tiny("swin")
    with pytest.raises(UserError, match=r"prune\.drop: no block can be left out whole.*relative_position_bias_table"):
        method.droppable(only, swin, find_structure(swin, ignore=["intermediate"]), None)
    for keep_ in ({"speedup": 2.0}, {"latency": 0.5, "against": "model"}, {"macs": 0.5}):
        found = only.model_copy(update={"keep": Keep.model_validate(keep_), "ignore": ["intermediate"]})
        with pytest.raises(UserError, match=r"prune\.drop: no block can be left out whole"):
            method.check(found, swin, Site("prune", exact=False))  # whatever the budget is, before any training


def test_the_method_drops_and_says_what_it_dropped(tmp_path):
    config = Curvature.model_validate(
        {"method": "curvature", "keep": {"encoder_params": 0.2}, "drop": True, "min_ffn": 8}
    )
    method = method_class(config)(config)
    tools = Tools(example=lambda: inputs("bert", batch=1), inputs=lambda: plain("bert", 4))
    model = method.finalize(method.prepare(tiny("bert"), tools), tools)
    facts = json.loads(json.dumps(method.facts()))
    gone = [row["name"] for row in facts["structure"]["blocks"] if not row["kept"]]
    assert gone and gone == facts["curvature"]["dropped"]
    left = {block.name: block.units for block in find_structure(model)}
    assert left == {row["name"]: row["kept"] for row in facts["structure"]["blocks"] if row["kept"]}
    assert sum(row["params"] for row in facts["structure"]["blocks"]) <= 0.2 * sum(
        row["params_total"] for row in facts["structure"]["blocks"]
    )
