"""Blocks found by dataflow: in many architectures, against the table of families, with the model's own weights."""

import copy

import pytest
import torch
import transformers as t
from kit import tiny_models
from kit.architectures import build, without_loss
from kit.structures import halved, zero_sinks
from kit.tiny_models import FAMILIES, RELATIVES, tiny
from torch import nn

from mptrain.compress.structure import version1
from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.budget import Budget
from mptrain.compress.structure.dataflow import proof
from mptrain.compress.structure.dataflow.finder import find
from mptrain.compress.structure.dataflow.record import tensors
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import ModelError
from mptrain.recipe.prune import Keep

HEADS_FFN = [("heads", 4), ("ffn", 48)] * 2
GROUPED = [("heads", 2), ("ffn", 48)] * 2
CROSS = [*HEADS_FFN, *[("heads", 4), ("heads", 4), ("ffn", 48)] * 2]
TIED = [("heads", 4), ("ffn", 48), ("ffn", 48), ("heads", 4), ("heads", 4), ("ffn", 48), ("ffn", 48)]

EXPECTED = {
    **dict.fromkeys("bert roberta distilbert electra deberta deberta-v2 modernbert esm ernie".split(), HEADS_FFN),
    **dict.fromkeys("rembert xlnet gpt2 gpt_neox gptj opt biogpt vit deit beit vit_msn hubert".split(), HEADS_FFN),
    **dict.fromkeys("wav2vec2 audio-spectrogram-transformer whisper gpt_bigcode falcon".split(), HEADS_FFN),
    **dict.fromkeys("llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 cohere glm stablelm".split(), GROUPED),
    **dict.fromkeys("bart pegasus marian m2m_100 speech_to_text vision-encoder-decoder umt5".split(), CROSS),
    **dict.fromkeys("t5 mt5".split(), TIED),  # one table of positions serves all layers, so their heads go together
    "mpnet": [("heads", 4), ("ffn", 48), ("ffn", 48)],
    "albert": [("heads", 4), ("ffn", 48)],  # one layer, used twice
    "nomic_bert": [("ffn", 48), ("heads", 4)] * 2,
    "dinov2": [("heads", 4), ("ffn", 128)] * 2,
    "swin": [("heads", 2), ("ffn", 64), ("heads", 4), ("ffn", 128)],
    "segformer": [("heads", 2), ("ffn", 32), ("heads", 4), ("ffn", 64)],
    "clip": [("heads", 2), ("ffn", 32)] * 2,
    "deepseek_v3": [("heads", 4), ("ffn", 48), ("heads", 4), ("ffn", 48), ("ffn", 48)],
    "convnext": [("ffn", 64), ("ffn", 128)],
    **dict.fromkeys("mixtral qwen3_moe gpt_oss".split(), GROUPED),  # a channel of all experts is one unit
    "qwen2_moe": [("heads", 2), ("ffn", 48), ("ffn", 48)] * 2,  # and the shared expert's
}
REFUSED = {
    "bloom": ([("ffn", 128)] * 2, "ALiBi"),
    "olmo2": ([("ffn", 48)] * 2, "mixes their channels"),
    "mamba": ([], "low rank"),
    "codegen": ([("ffn", 48)] * 2, "the proof failed"),
    "siglip": ([("heads", 2), ("ffn", 32)] * 2, "nn.MultiheadAttention"),
}
NOT_ANY_MORE = {"codegen": [("heads", 4), ("ffn", 48)] * 2}
"""what transformers wrote anew (by 5.24), so that all of it can be cut"""


def sizes(blocks):
    return [(block.kind, block.units) for block in blocks]


def run(model, batch):
    with torch.no_grad():
        return [x for x in tensors(model.eval()(**batch)) if x.is_floating_point()]


def check_shrunk_is_masked(model, blocks, batch):
    """On the weights that the model has."""
    structure = Structure("", tuple(blocks))
    kept = halved(structure)
    whole = run(model, batch)
    masked = run(zero_sinks(copy.deepcopy(model), structure, kept), batch)
    shrunk = run(shrink(copy.deepcopy(model), structure, kept), batch)
    assert any(not torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(whole, masked))
    for a, b in zip(shrunk, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of(name):
    model, batch = build(name)
    batch = without_loss(name, batch)
    blocks, _ = find(model, batch)
    assert sizes(blocks) == EXPECTED[name]
    assert len({block.name for block in blocks}) == len(blocks)
    check_shrunk_is_masked(model, blocks, batch)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_of(name):
    model, batch = build(name)
    expected, reason = REFUSED[name]
    batch = without_loss(name, batch)
    blocks, refused = find(model, batch)
    if sizes(blocks) == NOT_ANY_MORE.get(name):
        check_shrunk_is_masked(model, blocks, batch)
        return
    assert sizes(blocks) == expected
    assert any(reason in one.reason for one in refused)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_as_the_table_of_families_has_them(family, attn):
    model = tiny(family, attn)
    found, _ = find(model)
    _, table = version1.families_of(model)
    if not table:  # ViT's, DeiT's and Swin's, by transformers 5.24; 5.5 has those of the table
        pytest.skip(f"transformers {t.__version__} has other layers than the table of version 1")
    for ours, theirs in zip(found, table, strict=True):
        assert ours.axes == theirs.axes  # sources, biases and sinks in the same order too
        assert set(ours.edits) >= set(theirs.edits)
        fields = ("name", "kind", "units", "layer", "heads", "fixed_params", "cores", "prunable")
        assert [getattr(ours, f) for f in fields] == [getattr(theirs, f) for f in fields]


def test_a_network_of_convolutions():
    model, batch = build("resnet")
    blocks, _ = find(model, batch := without_loss("resnet", batch))
    channels = [block for block in blocks if block.kind == "channels"]
    assert [block.units for block in channels] == [16, 4, 4, 32, 8, 8]
    first = channels[1]
    sides = {axis.parameter.rpartition(".")[2] for axis in first.axes if axis.role == "side"}
    assert sides == {"weight", "bias", "running_mean", "running_var"}  # of batch norm
    cut_twice = [axis for block in channels for axis in block.axes if axis.parts == 2]
    assert cut_twice and all(axis.parameter.endswith("convolution.weight") for axis in cut_twice)
    check_shrunk_is_masked(model, blocks, batch)


def test_attention_without_heads_is_an_error_in_a_proof():
    """torch 2.7 would end the process."""
    q = torch.zeros(1, 2, 3, 4)
    with proof.NoEmptyAttention():
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
        with pytest.raises(ValueError, match="without heads"):
            torch.nn.functional.scaled_dot_product_attention(q, q, value=q[:, :0], enable_gqa=True)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch < 2.8 has no such kernel")
def test_experts_are_cut_in_steps_of_their_kernel():
    model, batch = build("qwen3_moe")
    structure = Structure("", tuple(find(model, batch)[0]))
    experts = structure.of_kind("ffn")[0]
    assert (experts.step, structure.of_kind("heads")[0].step) == (8, 1)
    budget = Budget(structure, Keep(ffn=0.5, heads=1.0), round_ffn=3)
    assert budget.round_up(experts, 20) == 24
    with pytest.raises(ModelError, match="multiple of 8"):
        shrink(model, structure, Kept({experts.name: list(range(20))}))


# -- modules of one's own


class Attention(nn.Module):
    """Fused projections, a learned slope for each head, and one that is a constant or a buffer."""

    def __init__(self, size=32, heads=4, width=48, constant=None):
        super().__init__()
        self.heads = heads
        self.kqv, self.mix = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.gates, self.down = nn.Linear(size, 2 * width, bias=False), nn.Linear(width, size)
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.slope = nn.Parameter(torch.randn(heads, 1, 1))
        fixed = torch.arange(1.0, heads + 1).view(heads, 1, 1)
        if constant == "buffer":
            self.register_buffer("fixed", fixed)
        self.constant, self.plain = constant, fixed

    def forward(self, x):
        batch, length, _ = x.shape
        k, q, v = self.kqv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5 + self.slope * torch.arange(length)
        if self.constant is not None:
            scores = scores + (self.fixed if self.constant == "buffer" else self.plain) * torch.arange(length)
        x = x + self.mix((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gates(self.second(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Own(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(2))
        self.out = nn.Linear(32, 50)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


IDS = {"ids": torch.arange(14).view(2, 7)}


def test_a_module_of_ones_own():
    torch.manual_seed(0)
    model = Own()
    blocks, refused = find(model, IDS)
    assert sizes(blocks) == HEADS_FFN and not refused
    heads, ffn = blocks[:2]
    assert [(a.parameter, a.dim, a.role, a.per_unit) for a in heads.axes] == [
        ("layers.0.kqv.weight", 0, "source", 24), ("layers.0.kqv.bias", 0, "side", 24),
        ("layers.0.mix.weight", 1, "sink", 8), ("layers.0.slope", 0, "side", 1),
    ]  # fmt: skip
    assert heads.axes[0].indices[1].tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert [(e.attribute, e.per_unit) for e in heads.edits if e.module == "layers.0"] == [("heads", 1)]
    assert ffn.axes[0].indices[5].tolist() == [5, 53]
    check_shrunk_is_masked(model, blocks, IDS)


def test_a_constant_that_differs_from_head_to_head_is_refused_and_a_buffer_is_cut_along():
    torch.manual_seed(0)
    blocks, refused = find(Own(constant="plain"), IDS)
    assert [b.kind for b in blocks] == ["ffn", "ffn"]
    assert [r.what for r in refused] == ["layers.0.heads", "layers.1.heads"] and "a buffer" in refused[0].reason
    model = Own(constant="buffer")
    blocks, refused = find(model, IDS)
    assert sizes(blocks) == HEADS_FFN and not refused
    assert "layers.0.fixed" in blocks[0].parameters
    check_shrunk_is_masked(model, blocks, IDS)


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, 5)

    def forward(self, ids):
        return self.out(self.encoder(self.table(ids)).mean(1))


def test_torchs_attention_is_refused_with_the_way_out():
    blocks, refused = find(Torch().eval(), IDS)
    assert sizes(blocks) == [("ffn", 48)] * 2
    assert len(refused) == 2 and all("replace it" in one.reason for one in refused)


def test_a_plain_network_of_matrices():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    blocks, _ = find(model, {"input": torch.randn(3, 4)})
    assert [(b.kind, b.units, b.sinks[0].parameter) for b in blocks] == [("ffn", 8, "2.weight"), ("ffn", 6, "4.weight")]
    assert [axis.parts for axis in blocks[0].axes] == [1, 1, 2]


# -- what finding leaves behind, and needs


def test_the_model_stays_as_it_was():
    model = tiny("bert").train()
    model.bert.encoder.layer[1].eval()
    model.config.use_cache = True
    model.to(torch.bfloat16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    before = torch.get_rng_state()
    find(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == training
    assert [type(module) for module in model.modules()] == classes and model.config.use_cache is True
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama", "swin", "wav2vec2"])
def test_a_model_without_weights_has_the_same_blocks(family):
    real = tiny(family)
    with torch.device("meta"):
        model = type(real)(copy.deepcopy(real.config))
    assert find(model) == find(real)
    assert model.get_parameter(find(real)[0][0].sinks[0].parameter).is_meta


def test_a_shrunk_model_has_the_blocks_that_are_left():
    model = tiny("llama")
    structure = Structure("", tuple(find(model)[0]))
    kept = halved(structure)
    shrink(model, structure, kept)
    assert [(b.name, b.units) for b in find(model)[0] if b.kind == "ffn"] == [
        (b.name, 24) for b in structure if b.kind == "ffn"
    ]


def test_a_model_that_does_not_run_on_the_example():
    with pytest.raises(ModelError, match=r"Own does not run on the example \(ids\).*IndexError"):
        find(Own(), {"ids": torch.full((2, 7), 99)})
    with pytest.raises(ModelError, match="without an example"):
        find(Own())


def test_examples_are_made_up_for_pictures_sounds_and_two_sides():
    for cls, config in (
        (t.BartForConditionalGeneration, t.BartConfig),
        (t.WhisperForConditionalGeneration, t.WhisperConfig),
    ):
        small = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 60}
        own = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
        blocks, _ = find(cls(config(**small, **heads, **own)))
        assert sizes(blocks) == [("heads", 4), ("ffn", 48), ("heads", 4), ("heads", 4), ("ffn", 48)]
    assert tiny_models.inputs("vit")["pixel_values"].shape[-1] == 16


class Scaled(nn.Module):
    """A scale that is one number, as GeM's power: it has no index, and joins no channels."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * self.scale)


def test_a_parameter_of_one_number_joins_nothing():
    blocks, refused = find(Scaled().eval(), {"x": torch.randn(2, 4)})
    assert [(block.kind, block.units) for block in blocks] == [("ffn", 16)] and not refused
