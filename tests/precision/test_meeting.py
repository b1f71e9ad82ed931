"""fp32 inputs and buffers meet half weights as under autocast: no data is rounded, no buffer stops a model."""

import collections

import pytest
import torch
import transformers as t
from torch import nn
from torch.utils.checkpoint import checkpoint

from mptrain import MasterWeights
from mptrain.precision.casting import cast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NOISE = {"bf16": 2e-2, "fp16": 2e-3}


def wrap(model, dtype="bf16", **options):
    return MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=1e-3), dtype, **options)


def compared(model, inputs, dtype, noise=None, **options):
    """Outputs in half are those in fp32 within the dtype's noise, twice alike, and a step is taken."""
    torch.manual_seed(0)
    expected = model.eval()(*inputs)
    mw = wrap(model, dtype, **options)
    found, again = model(*inputs), model(*inputs)
    torch.testing.assert_close(found, expected, rtol=noise or NOISE[dtype], atol=noise or NOISE[dtype])
    assert torch.equal(found, again)
    stepped(mw, lambda: model.train()(*inputs).square().mean())
    return mw


def stepped(mw, loss):
    """A step is taken, once the loss scale has found its place."""
    for _ in range(6):
        mw.backward(loss())
        if mw.step():
            return
    raise AssertionError("no step was taken")


def meeting(mw):
    return mw._casts._meeting


# -- inputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_series_around_2000_is_not_rounded(dtype):
    torch.manual_seed(0)
    sizes = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16}
    config = t.PatchTSTConfig(**sizes, num_attention_heads=2, ffn_dim=32, prediction_length=8)
    model = t.PatchTSTForPrediction(config).eval()
    batch = {"past_values": 2000 + torch.randn(8, 32, 2), "future_values": 2000 + torch.randn(8, 8, 2)}
    expected = model(**batch).loss.item()
    mw = wrap(model, dtype)
    loss = model(**batch).loss
    mw.backward(loss)
    assert mw.step() and mw.grad_norm > 0.1
    assert expected > 0.5 and loss.item() == pytest.approx(expected, rel=1e-3)


def test_targets_and_times_arrive_as_they_are():
    seen = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x, time, target=None):
            seen.update(time=time, target=target)
            return {"loss": nn.functional.mse_loss(self.linear(x) + time / 1000, target)}

    model = Model()
    wrap(model)
    time, target = torch.tensor([[998.39]]), torch.tensor([[1234.5]])
    model(torch.randn(1, 4), time, target=target)
    assert seen["time"] is time and seen["target"] is target


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_that_rounding_changes_is_told_once(dtype, caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    wrap(model, dtype)
    model(torch.randn(64, 4))
    assert "is rounded" not in caplog.text
    x = 2000 + torch.randn(64, 4)
    wrap(other := nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), dtype)
    other(x)
    other.eval()(x)
    assert caplog.text.count("input argument 0 is rounded to") == 1
    assert "keep_fp32: ['0']" in caplog.text and "normalise it" in caplog.text


def test_operands_that_a_forward_multiplies_itself_meet_half_weights():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 3) / 3)

        def forward(self, x, edges):
            return torch.tanh(edges @ self.linear(x)) @ self.weight

    mw = compared(Graph(), (torch.randn(5, 8), torch.rand(5, 5)), "bf16")
    assert list(meeting(mw)._watched.values()) == [True, False]  # its own operations, not those of its Linear


# -- buffers


class Positions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("pe", torch.randn(64, width))

    def forward(self, x):
        return x + self.pe[: x.shape[1]]


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((8,), 2000.0))
        self.register_buffer("std", torch.full((8,), 2.0))
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear((x - self.mean) / self.std)


class Biased(nn.Module):
    """Attention with a bias that is a buffer: the probabilities become fp32, the values are half."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(16, 3)
        self.register_buffer("bias", torch.randn(10, 10))

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x)).chunk(3, -1)
        return self.out(((q @ k.transpose(1, 2)) / 4 + self.bias).softmax(-1) @ v)


class Scattered(nn.Module):
    """Writes activations into an fp32 buffer's copy, and fp32 values into activations."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("base", torch.zeros(4, 8))

    def forward(self, x):
        h = self.linear(x)
        base = self.base.clone()
        base[x[:, 0] > 0] = h[x[:, 0] > 0]
        h = h.masked_scatter(h > 0, self.base + 1)
        return self.linear(base + h)


def ids():
    return (torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(0)),)


def table(batch_first=True):
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=batch_first)
    return nn.Sequential(nn.Embedding(50, 32), Positions(32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 3))


BUFFERS = {
    "positions": lambda: (nn.Sequential(nn.Embedding(50, 32), Positions(32), nn.Linear(32, 3)), ids()),
    "positions and an encoder": lambda: (table(), ids()),
    "mean and std": lambda: (Standardised(), (2000 + 2 * torch.randn(4, 8),)),
    "attention bias": lambda: (Biased(), ids()),
    "scattered": lambda: (Scattered(), (torch.randn(4, 8),)),
    "spectral norm": lambda: (nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8))), (torch.randn(4, 8),)),
    "spectral norm as parametrization": lambda: (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))),
        (torch.randn(4, 8),),
    ),
    "lstm": lambda: (Recurrent(), (2000 + torch.randn(4, 6, 8),)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTM(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)])
        self.register_buffer("mean", torch.full((8,), 2000.0))

    def forward(self, x):
        x = x - self.mean
        for cell in self.cells:
            x = cell(x)[0]
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUFFERS)
def test_float_buffers_stop_no_model(name, dtype):
    torch.manual_seed(0)
    model, inputs = BUFFERS[name]()
    before = {n: b.clone() for n, b in model.named_buffers() if "_u" not in n and "_v" not in n}
    compared(model, inputs, dtype)
    assert all(torch.equal(b, before[n]) and b.dtype == torch.float32 for n, b in model.named_buffers() if n in before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinusoidal_positions_of_transformers(dtype):
    ids = {"vocab_size": 50, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {
        f"{s}_{k}": v
        for s in ("encoder", "decoder")
        for k, v in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    torch.manual_seed(0)
    model = t.M2M100ForConditionalGeneration(
        t.M2M100Config(d_model=16, max_position_embeddings=32, **sizes, **ids)
    ).eval()
    words = torch.randint(3, 50, (2, 8))
    expected = model(input_ids=words, labels=words).loss.item()
    mw = wrap(model, dtype)
    loss = model(input_ids=words, labels=words).loss
    assert loss.item() == pytest.approx(expected, rel=NOISE[dtype]) and loss.dtype == torch.float32
    mw.backward(loss)
    assert mw.step()


def test_what_one_layer_met_holds_for_all_like_it():
    """A layer that the first forward skipped (LayerDrop) is ready when it comes."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = Positions(8)
            self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)])
            self.used = (0,)

        def forward(self, x):
            x = self.start(x)
            for i in self.used:
                x = x + self.layers[i](x)
            return x

    model = Dropping()
    wrap(model)
    model(torch.randn(2, 5, 8))
    model.used = (1, 2, 3)
    assert model(torch.randn(2, 5, 8)).isfinite().all()


def test_what_was_met_is_ready_when_checkpointing_computes_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Biased()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, plain = Block(), Biased()
    plain.load_state_dict(model.inner.state_dict())
    runs = []
    for m in (model, plain):
        mw = wrap(m)
        for _ in range(3):
            mw.backward(m(ids()[0]).square().mean())
            assert mw.step()
        runs.append(list(mw.masters.read().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_model_of_words_pays_for_nothing():
    """No operation is watched after the first forward, and no layer of a block casts."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    models = [
        t.BertForSequenceClassification(t.BertConfig(vocab_size=50, **sizes)),
        t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, **sizes)),
    ]
    for model in models:
        mw = wrap(model)
        words = ids()[0]
        model(words, labels=words if isinstance(model, t.LlamaForCausalLM) else torch.zeros(4, dtype=torch.long))
        assert not meeting(mw)._watched
        assert not [n for m in meeting(mw)._layers for n in [meeting(mw)._names[m]] if ".layer" in n]
        assert torch._C._len_torch_function_stack() == 0


def test_an_error_in_the_first_forward_leaves_no_mode_behind():
    model = Biased()
    wrap(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, dtype=torch.long))  # 3 tokens, the bias has 10
    assert torch._C._len_torch_function_stack() == 0
    assert model(ids()[0]).isfinite().all()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, dtype=torch.long))
    assert torch._C._len_torch_function_stack() == 0


def test_exposing_keeps_what_was_learnt():
    model = Biased()
    mw = wrap(model)
    model(ids()[0])
    watched = dict(meeting(mw)._watched)
    with mw.exposed():
        assert model(ids()[0]).dtype == torch.float32
    assert meeting(mw)._watched == watched and len(meeting(mw)._known) == 1
    model(ids()[0])
    assert len(meeting(mw)._known) == 1


# -- losses


def clip():
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = (
        {**tower, "vocab_size": 50, "max_position_embeddings": 16},
        {**tower, "image_size": 16, "patch_size": 8},
    )
    return text, vision, {"input_ids": torch.randint(3, 50, (4, 6)), "pixel_values": torch.randn(4, 3, 16, 16)}


def two_towers(kind):
    text, vision, batch = clip()
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), batch
    return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)), batch


def perceiver():
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    sizes |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 50}
    sizes |= {"max_position_embeddings": 16, "num_labels": 3}
    batch = {"inputs": torch.randint(3, 50, (4, 16)), "labels": torch.tensor([0, 1, 2, 0])}
    return t.PerceiverForSequenceClassification(t.PerceiverConfig(**sizes)), batch


class Handmade(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))

    def forward(self, x):
        return {"loss": nn.functional.cross_entropy(self.net(x).flatten(0, 1), x.flatten())}


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        config = t.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
        )
        self.inner = t.BertForSequenceClassification(config)

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["clip", "siglip", "perceiver", "handmade", "wrapped"])
def test_a_loss_in_the_model_is_computed_in_fp32(kind, dtype):
    torch.manual_seed(0)
    if kind in ("clip", "siglip"):
        model, batch = two_towers(kind)
        batch["return_loss"] = True
    elif kind == "perceiver":
        model, batch = perceiver()
    elif kind == "wrapped":
        model, batch = Wrapped(), {"input_ids": ids()[0], "labels": torch.tensor([0, 1, 1, 0])}
    else:
        model, batch = Handmade(), {"x": ids()[0]}
    expected = model.eval()(**batch)["loss"].item()
    mw = wrap(model, dtype)
    losses = [model(**batch)["loss"] for _ in range(2)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    assert losses[0].item() == pytest.approx(expected, rel=NOISE[dtype])
    stepped(mw, lambda: model(**batch)["loss"])


# -- containers


def test_containers_keep_their_kind():
    half = torch.ones(2, dtype=torch.bfloat16)
    Point = collections.namedtuple("Point", "x y")
    feature = t.BatchFeature({"x": half, "n": 3})
    known = collections.defaultdict(list, {"x": half})
    bare = t.utils.ModelOutput({"x": half})
    for value in (feature, known, {"x": half}, collections.OrderedDict(x=half), bare):
        found = cast(value, torch.bfloat16, torch.float32)
        assert type(found) is type(value) and found["x"].dtype == torch.float32 and value["x"].dtype == torch.bfloat16
        assert cast({"x": 1, "n": value}, torch.float64, torch.float32)["n"] is value
    assert cast(known, torch.bfloat16, torch.float32)["missing"] == []
    assert cast(feature, torch.bfloat16, torch.float32)["n"] == 3
    assert cast(Point(half, 2), torch.bfloat16, torch.float32).x.dtype == torch.float32
    out = t.modeling_outputs.SequenceClassifierOutput(logits=half, hidden_states=(half,))
    found = cast(out, torch.bfloat16, torch.float32)
    assert found.logits.dtype == found.hidden_states[0].dtype == torch.float32 and found.loss is None


def test_models_that_take_and_give_other_mappings():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, features):
            return collections.defaultdict(list, {"logits": self.linear(features["x"])})

    model = Model()
    wrap(model)
    found = model(t.BatchFeature({"x": torch.randn(3, 4)}))
    assert found["logits"].dtype == torch.float32 and found["other"] == []
