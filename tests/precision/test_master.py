"""What the flat masters survive: the list of models and events a training script meets."""

import copy

import pytest
import torch
from kit.long import except_for
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mptrain.core.errors import ModelError, UserError
from mptrain.precision import MasterWeights

GPT2 = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": 32, "bos_token_id": 0},
    **{"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODES = [("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "split")]


def gpt2(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes})).train()


def batch(seed, vocabulary=60):
    x = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": x, "labels": x}


def wrap(model, dtype="bf16", master="fp32", lr=1e-2, **options):
    return MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=lr), dtype, master, **options)


def train(mw, model, steps=3, data=batch):
    losses = []
    for i in range(steps):
        loss = model(**data(i)).loss
        mw.backward(loss)
        assert mw.step()
        losses.append(loss.item())
    return losses


def halves_follow_masters(mw):
    """Every half parameter is its master rounded, where the master itself is fp32."""
    checked = 0
    for name, (flat, entry) in mw.masters.by_name.items():
        master = mw.masters.read()[name]
        assert master.dtype == torch.float32
        if not flat.split:
            assert torch.equal(entry.parameter.detach(), master.to(flat.dtype)), name
        checked += 1
    return checked


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_parameters_become_half_views_of_one_buffer_and_keep_their_identity(dtype, master):
    model = gpt2()
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    mw = wrap(model, dtype, master)
    (flat,) = mw.flats
    assert dict(model.named_parameters()) == {n: p for n, (p, _) in before.items()}
    for name, (p, value) in before.items():
        assert p.dtype == DTYPES[dtype]
        start = flat.half.data_ptr() + 2 * mw.masters.by_name[name][1].offset
        assert p.data_ptr() == p.untyped_storage().data_ptr() == start  # a storage of its own over that memory
        assert p.untyped_storage().nbytes() == 2 * p.numel()
        assert torch.equal(mw.masters.read()[name], value)  # bit for bit
    assert model.transformer.wte.weight is model.lm_head.weight
    assert len(list(model.parameters())) == len(flat.entries)


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_sync_writes_the_masters_into_the_half_weights_in_place(dtype, master):
    model = gpt2()
    mw = wrap(model, dtype, master)
    addresses = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad(), mw.exposed(write=True):
        model.transformer.wte.weight.fill_(0.1)
    if master == "fp32":
        mw.flats[0].master.mul_(3.0)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            mw.sync()
        assert sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0) == 0
        assert torch.equal(model.lm_head.weight, torch.full((60, 32), 0.1).mul(3.0).to(DTYPES[dtype]))
        halves_follow_masters(mw)
    mw.sync()
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_frozen_non_float_and_gradientless_parameters(dtype, master):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.table = nn.Parameter(torch.arange(8), requires_grad=False)
            self.flags = nn.Parameter(torch.ones(8, dtype=torch.bool), requires_grad=False)
            self.register_buffer("frequencies", torch.linspace(0, 1, 8))
            self.b.requires_grad_(False)

        def forward(self, x):
            return self.b(self.a(x))[..., self.table]

    model = Odd()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    mw = MasterWeights(model, optimizer, dtype, master)
    for _ in range(2):
        mw.backward(model(torch.randn(4, 8)).square().mean())
        assert mw.step()
    now = mw.masters.read()
    assert not torch.equal(now["a.weight"], start["a.weight"])
    for name in ("b.weight", "b.bias", "unused.weight", "unused.bias"):
        assert torch.equal(now[name], start[name])  # not even decayed
    assert model.b.weight.dtype == DTYPES[dtype]
    assert (model.table.dtype, model.flags.dtype, model.frequencies.dtype) == (torch.int64, torch.bool, torch.float32)
    assert len(mw.optimizer.state) == 2  # as torch: no state for what was never updated


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_half_checkpoint_gets_true_fp32_masters(dtype):
    model = gpt2().to(torch.float16)
    start = {n: p.detach().float() for n, p in model.named_parameters()}
    mw = wrap(model, dtype, lr=1e-5)
    assert all(torch.equal(m, start[n]) for n, m in mw.masters.read().items())
    train(mw, model, 2)
    moved = [(m - start[n]).abs().max() for n, m in mw.masters.read().items()]
    assert all(0 < d < 1e-4 for d in moved)  # steps far below the resolution of the half weights


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("inside", [True, False], ids=["exposed", "behind our back"])
@pytest.mark.parametrize("size", [70, 50])
def test_resize_token_embeddings_keeps_masters_and_moments(dtype, master, inside, size):
    model = gpt2()
    mw = wrap(model, dtype, master)
    train(mw, model)
    before = {n: m.clone() for n, m in mw.masters.read().items()}
    moments = {n: mw.optimizer.state[e.master]["exp_avg"].clone() for n, (_, e) in mw.masters.by_name.items()}
    if inside:
        with mw.exposed():
            model.resize_token_embeddings(size)
    else:
        model.resize_token_embeddings(size)
    mw.backward(model(**batch(0, 50)).loss)
    after = mw.masters.read()
    kept = min(size, 60)
    assert after["transformer.wte.weight"].shape == (size, 32)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == DTYPES[dtype]
    for name, m in before.items():
        rows = slice(0, kept) if name == "transformer.wte.weight" else slice(None)
        assert torch.equal(after[name][rows], m[rows]), name
        now = mw.optimizer.state[mw.masters.by_name[name][1].master]["exp_avg"]
        assert torch.equal(now[rows], moments[name][rows]), name
    assert mw.step()
    train(mw, model, 1, lambda i: batch(i, 50))
    assert not torch.equal(mw.masters.read()["transformer.wte.weight"][:kept], before["transformer.wte.weight"][:kept])


def test_resizing_an_untied_head_replaces_its_parameters():
    model = gpt2(tie_word_embeddings=False)
    mw = wrap(model)
    train(mw, model, 1)
    head = mw.masters.read()["lm_head.weight"].clone()
    with mw.exposed():
        model.resize_token_embeddings(64)
    assert torch.equal(mw.masters.read()["lm_head.weight"][:60], head)
    train(mw, model, 1, lambda i: batch(i, 64))
    assert not torch.equal(mw.masters.read()["lm_head.weight"][:60], head)
    assert halves_follow_masters(mw) == len(list(model.parameters()))


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_gradient_checkpointing_changes_nothing(dtype, master):
    plain, saving = gpt2(), gpt2()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    runs = [train(wrap(m, dtype, master), m) for m in (plain, saving)]
    assert runs[0] == runs[1]


def test_torch_checkpoint_around_a_module_kept_in_fp32():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + checkpoint(lambda y: self.linear(self.norm(y)), x, use_reentrant=False)

    model = nn.Sequential(nn.Linear(8, 8), Block())
    mw = wrap(model, keep_fp32=["norms"])
    mw.backward(model(torch.randn(3, 8)).square().mean())
    assert mw.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, while it traces
@pytest.mark.parametrize("order", except_for(["compiled before", "compiled after"], ["compiled after"]))
def test_compiled_models_train_the_same(order):
    model, eager = gpt2(), gpt2()
    expected = train(wrap(eager), eager)
    if order == "compiled before":
        called = torch.compile(model, backend="aot_eager")
        mw = wrap(called)
    else:
        mw = wrap(model)
        called = torch.compile(model, backend="aot_eager")
    actual = train(mw, called)
    assert actual == pytest.approx(expected, rel=1e-3)
    assert "transformer.wte.weight" in mw.masters.by_name


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("event", ["sync", "load", "train", "expose"])
@pytest.mark.parametrize("move", ["copied", "cast", "cast to the other half"])
def test_a_model_that_is_copied_or_cast_comes_back_with_its_masters(dtype, master, event, move):
    """Accelerate calls model.to(torch.device("cpu", 0)) under DDP, which copies every parameter."""
    model, other = gpt2(), gpt2(1)
    mw, source = wrap(model, dtype, master), wrap(other, dtype, master)
    train(mw, model)
    train(source, other, 2)
    state = source.state_dict()
    expected = {n: m.clone() for n, m in (source if event == "load" else mw).masters.read().items()}
    address = model.lm_head.weight.data_ptr()
    moves = {"copied": torch.device("cpu", 0), "cast": torch.float32}
    model.to(moves.get(move, torch.float16 if dtype == "bf16" else torch.bfloat16))
    assert model.lm_head.weight.data_ptr() != address
    if event == "sync":
        mw.sync()
    elif event == "load":
        mw.load_state_dict(state)
    elif event == "train":
        mw.backward(model(**batch(0)).loss if move == "copied" else model.lm_head.weight.sum())
    else:
        with mw.exposed():
            assert torch.equal(model.lm_head.weight, expected["transformer.wte.weight"])
    assert all(torch.equal(m, expected[n]) for n, m in mw.masters.read().items())
    assert model.lm_head.weight.dtype == DTYPES[dtype]
    halves_follow_masters(mw)
    assert mw.step() or event != "train"
    train(mw, model, 1)


def test_the_optimizer_with_masters_cannot_be_copied():
    model = gpt2()
    mw = wrap(model)
    with pytest.raises(UserError, match="MasterWeights cannot be copied or pickled"):
        copy.deepcopy(mw)
    train(mw, model, 1)


# -- kept in fp32


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_stay_in_fp32_and_compute_in_it(dtype):
    model = gpt2()
    seen = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda m, a, o: seen.append((a[0].dtype, o.dtype)), prepend=True)
    mw = wrap(model, dtype, keep_fp32=["norms"])
    train(mw, model)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert {n for n, d in kinds.items() if d == torch.float32} == {n for n in kinds if ".ln_" in n}
    assert seen[0] == (torch.float32, torch.float32)
    assert {f.dtype for f in mw.flats} == {DTYPES[dtype], torch.float32}
    assert all(m.dtype == torch.float32 for m in mw.masters.read().values())


def test_a_kept_block_runs_in_fp32_inside_so_that_fp16_does_not_overflow():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            nn.init.constant_(self.up.weight, 3e4)
            nn.init.constant_(self.down.weight, 1e-6)

        def forward(self, x):
            return self.down(self.up(x))

    for keep, finite in ((["1."], True), ([], False)):
        model = nn.Sequential(nn.Linear(4, 4), Block())
        nn.init.ones_(model[0].weight)
        MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16", keep_fp32=keep)
        assert bool(model(torch.ones(1, 4)).isfinite().all()) is finite


def test_a_tied_parameter_is_kept_by_all_its_owners():
    model = gpt2()
    wrap(model, keep_fp32=["lm_head"])
    assert model.transformer.wte.weight.dtype == torch.float32
    assert model(**batch(0)).loss.isfinite()


def test_keep_patterns_that_match_nothing_or_everything_are_errors():
    with pytest.raises(ModelError, match=r"'lnorm' matches no parameter; names are like transformer\.wte\.weight"):
        wrap(gpt2(), keep_fp32=["norms", "lnorm"])
    with pytest.raises(ModelError, match="keeps every parameter"):
        wrap(gpt2(), keep_fp32=["re:.*"])
    with pytest.raises(UserError, match="must be a list"):
        wrap(gpt2(), keep_fp32="norms")


def test_transformers_own_fp32_modules_are_kept_for_fp16():
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).train()
    mw = wrap(model, "fp16")
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in model.named_parameters() if ".wo." in n}
    train(mw, model, 2, lambda i: batch(i, 30))


def test_batch_norm_keeps_fp32_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    mw = wrap(model)
    mw.backward(model(torch.randn(2, 3, 8, 8)).square().mean())
    assert mw.step()
    assert model[1].weight.dtype == model[1].running_mean.dtype == torch.float32


def test_channels_last_weights_keep_their_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    expected = [p.stride() for p in model.parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    mw = wrap(model)
    assert [p.stride() for p in model.parameters()] == expected
    assert all(torch.equal(a, b) for a, b in zip(mw.masters.read().values(), start, strict=True))
    mw.backward(model(torch.randn(2, 3, 8, 8)).square().mean())
    gradients = {n: p.grad.float() for n, p in model.named_parameters()}
    mw.step()
    for (n, m), s in zip(mw.masters.read().items(), start, strict=True):
        assert torch.equal((s * (1 - 1e-4) - m).sign(), torch.where(gradients[n] == 0, 0, gradients[n].sign())), n


# -- families, inputs and outputs


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("keep", [(), ("norms",)])
def test_bert_and_vit_train(dtype, master, keep):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertForSequenceClassification(BertConfig(vocab_size=60, **small)).train()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 6:] = 0
    words = lambda i: {**batch(i), "labels": torch.tensor([0, 1]), "attention_mask": mask}  # noqa: E731
    train(wrap(bert, dtype, master, keep_fp32=keep), bert, 2, words)
    vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **small)).train()
    images = lambda i: {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}  # noqa: E731
    train(wrap(vit, dtype, master, keep_fp32=keep), vit, 2, images)


def test_regression_labels_stay_fp32_and_loss_outside_the_model_is_fp32():
    seen = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x, labels=None):
            seen.update(x=x.dtype, labels=None if labels is None else labels.dtype)
            return {"logits": self.linear(x), "ids": torch.ones(1, dtype=torch.long)}

    model = Model()
    wrap(model)
    out = model(torch.randn(2, 4), labels=torch.randn(2, 1))
    assert seen == {"x": torch.float32, "labels": torch.float32}  # inputs are cast where they meet half weights
    assert (out["logits"].dtype, out["ids"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_compute_their_loss_in_fp32(family, dtype, master):
    """Their code takes the cross entropy of the logits as they are; in bf16 it would have three digits."""
    torch.manual_seed(0)
    ids = {"vocab_size": 30, "decoder_start_token_id": 0, "pad_token_id": 0}
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **ids))
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        width = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
        model = BartForConditionalGeneration(BartConfig(**layers, **width, **ids))
    mw = wrap(model.train(), dtype, master)
    out = model(**batch(0, 30))
    assert out.loss.dtype == out.logits.dtype == torch.float32
    exact = nn.functional.cross_entropy(out.logits.double().flatten(0, 1), batch(0, 30)["labels"].flatten())
    assert out.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    train(mw, model, 2, lambda i: batch(i, 30))


def test_outputs_with_a_loss_stay_half_and_keep_their_type():
    model = gpt2()
    wrap(model)
    out = model(**batch(0))
    assert out.logits.dtype == torch.bfloat16
    out = model(input_ids=batch(0)["input_ids"], use_cache=False)
    assert out.logits.dtype == torch.float32
    assert out.loss is None


# -- fp32 views of the model


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_exposed_shows_fp32_and_leaves_everything_as_it_was(dtype, master):
    model = gpt2()
    mw = wrap(model, dtype, master)
    train(mw, model)
    parameters = list(model.parameters())
    half = [p.detach().clone() for p in parameters]
    expected = {n: m.clone() for n, m in mw.masters.read().items()}
    with mw.exposed():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.transformer.wte.weight
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
        reference = gpt2()
        reference.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(**batch(5)).loss, reference(**batch(5)).loss)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p, h) for p, h in zip(parameters, half, strict=True))
    train(mw, model, 1)


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_goes_to_the_masters(dtype, master, assign):
    model, other = gpt2(0), gpt2(1)
    mw = wrap(model, dtype, master)
    train(mw, model, 1)
    parameters = list(model.parameters())
    missing, unexpected = model.load_state_dict(other.state_dict(), assign=assign)
    assert (missing, unexpected) == ([], [])
    values = dict(other.named_parameters())
    assert all(torch.equal(m, values[n]) for n, m in mw.masters.read().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight.dtype == DTYPES[dtype]
    halves_follow_masters(mw)
    train(mw, model, 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    assert model.lm_head.weight.dtype == DTYPES[dtype]


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_half_weights_that_are_loaded_round_no_master_in_silence(dtype, master, assign, caplog):
    model = gpt2()
    mw = wrap(model, dtype, master)
    train(mw, model, 1)
    before = {n: m.clone() for n, m in mw.masters.read().items()}
    own = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    assert own["lm_head.weight"].dtype == DTYPES[dtype]
    model.load_state_dict(own, assign=assign)
    assert all(torch.equal(m, before[n]) for n, m in mw.masters.read().items())
    assert not caplog.text
    other = gpt2(1).to(DTYPES[dtype]).state_dict()
    model.load_state_dict(other, assign=assign)
    assert "28 of 28 parameters are loaded from half weights" in caplog.text
    assert all(torch.equal(m, other[n].float()) for n, m in mw.masters.read().items())
    halves_follow_masters(mw)
    caplog.clear()
    with mw.exposed(write=True):
        model.load_state_dict(other)
    assert "28 of 28 parameters are loaded from half weights" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_weights_that_were_read_from_a_half_checkpoint_are_told(dtype, caplog):
    wrap(gpt2())
    assert not caplog.text
    model = gpt2()
    model.load_state_dict(gpt2().to(DTYPES[dtype]).state_dict())
    assert model.lm_head.weight.dtype == torch.float32
    wrap(model)
    assert "all are numbers of half precision" in caplog.text and "dtype=torch.float32" in caplog.text


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_saved_while_exposed_a_model_loads_as_fp32(dtype, master, tmp_path):
    model = gpt2()
    mw = wrap(model, dtype, master)
    train(mw, model, 1)
    with mw.exposed():
        model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config.dtype == torch.float32
    assert all(torch.equal(p, mw.masters.read()[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_release_gives_an_fp32_model_and_a_working_optimizer_back(dtype, master):
    model = gpt2()
    mw = wrap(model, dtype, master)
    train(mw, model)
    expected = {n: m.clone() for n, m in mw.masters.read().items()}
    optimizer = mw.optimizer
    assert mw.release() is model
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    model(**batch(0)).loss.backward()
    optimizer.step()
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert MasterWeights(model, optimizer, dtype, master).optimizer is optimizer


# -- wrong use


def test_wrong_arguments_are_named():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, message in [
        ({"dtype": "fp8"}, "must be 'fp16' or 'bf16', got 'fp8'"),
        ({"master": "none"}, "must be 'fp32' or 'split'"),
        ({"dtype": "fp16", "master": "split"}, "needs bf16, got fp16"),
        ({"reduce": "bf16"}, "must be 'fp32' or 'compute'"),
        ({"kernel": "cuda"}, "must be 'auto', 'native' or 'torch'"),
        ({"keep_fp32": ["re:("]}, r"'re:REGEX' and 'norms', got 're:\(' \(missing \)"),
        ({"keep_fp32": [3]}, "substrings of parameter names, .* got 3"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be None or a number of at least 0, got -1\.0"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be .* got '1'"),
    ]:
        with pytest.raises(UserError, match=message):
            MasterWeights(model, optimizer, **arguments)
    with pytest.raises(UserError, match=r"must be a torch\.optim optimizer, got MasterWeights"):
        MasterWeights(model, MasterWeights(model, optimizer))
    with pytest.raises(UserError, match="split masters need Adam, AdamW or SGD, got RMSprop"):
        MasterWeights(model, torch.optim.RMSprop(model.parameters()), master="split")
    with pytest.raises(UserError, match="holds no parameter of this model"):
        MasterWeights(nn.Linear(2, 2), torch.optim.SGD(model.parameters()))
    with pytest.raises(UserError, match="LBFGS evaluates the loss itself"):
        MasterWeights(model, torch.optim.LBFGS(model.parameters()))


def test_a_trained_float64_parameter_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ModelError, match=r"1\.weight is trained and must be fp32, fp16 or bf16, got torch\.float64"):
        wrap(model)


def test_sparse_gradients_are_an_error():
    model = nn.Embedding(5, 4, sparse=True)
    mw = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    mw.backward(model(torch.tensor([1, 2])).sum())
    with pytest.raises(ModelError, match="weight has a sparse gradient"):
        mw.step()


def test_stepping_the_wrapped_optimizer_is_an_error():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    mw = MasterWeights(model, optimizer)
    mw.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(UserError, match=r"Call step\(\) of the MasterWeights"):
        optimizer.step()
    assert mw.step()
