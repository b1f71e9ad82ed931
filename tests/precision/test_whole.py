"""Every way a model with masters is saved, copied, loaded or exported gives whole fp32 weights, or is refused."""

import copy
import io
import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mptrain import MasterWeights
from mptrain.core.errors import UserError

MODES = [("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "split")]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 160), nn.ReLU(), nn.Linear(160, 4))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def wrap(model, dtype="bf16", master="fp32", lr=1e-2):
    return MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=lr), dtype, master)


def masters(mw):
    return {n: m.clone() for n, m in mw.masters.read().items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        x.dtype == torch.float32 and torch.equal(x, expected[n]) for n, x in found.items()
    )


@pytest.fixture(params=MODES, ids=["bf16", "fp16", "split"])
def mode(request):
    return request.param


@pytest.mark.parametrize("exposed", [False, True])
def test_accelerate_saves_and_loads_all_weights(tmp_path, mode, exposed):
    model = net()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    mw = wrap(model, *mode)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    with mw.exposed() if exposed else torch.no_grad():
        accelerator.save_state(tmp_path / "state")
        accelerator.save_model(prepared, tmp_path / "model")
    assert same(load_file(tmp_path / "state" / "model.safetensors"), start)
    assert same(load_file(tmp_path / "model" / "model.safetensors"), start)
    with torch.no_grad(), mw.exposed(write=True):
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path / "state")
    assert same(masters(mw), start)


@pytest.mark.parametrize("exposed", [False, True])
def test_safetensors_saves_tied_weights_once(tmp_path, mode, exposed):
    model = gpt2()
    mw = wrap(model, *mode)
    plain = gpt2()
    save_model(plain, tmp_path / "plain.safetensors")
    with mw.exposed() if exposed else torch.no_grad():
        save_model(model, tmp_path / "model.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "plain.safetensors"))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file


def test_a_part_does_not_drag_the_whole_buffer_into_the_file(mode):
    model = net()
    mw = wrap(model, *mode)
    x = torch.randn(4, 8)
    mw.backward(model(x).square().mean())
    mw.step()
    state = mw.state_dict()
    with mw.exposed():
        exposed = model.state_dict()["2.bias"]
    parts = {
        "state dict": model.state_dict()["2.bias"],
        "exposed": exposed,
        "parameter": model[2].bias,
        "half": model[2].bias.detach(),
        "of a submodule": model[2].state_dict()["bias"],
        "masters": state["masters"]["2.bias"],
        "moments": state["state"][3]["exp_avg"],
    }
    expected = masters(mw)["2.bias"]
    for name, part in parts.items():
        file = saved(part)
        assert len(file.getvalue()) < 3000, name  # the weights of the model are 7,936 bytes
        file.seek(0)
        found = torch.load(file, weights_only=True)
        if name == "half":
            assert torch.equal(found, model[2].bias)
        elif name != "moments":
            assert found.dtype == torch.float32 and torch.equal(found, expected), name


def test_a_pickled_model_is_fp32_and_knows_nothing_of_masters(mode):
    model = nn.ModuleDict({"inner": gpt2(), "other": nn.Linear(2, 2)})
    mw = wrap(model["inner"], *mode)
    file = saved(model)
    assert b"mptrain" not in file.getvalue()
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        inner = again["inner"]
        assert same(dict(inner.named_parameters()), masters(mw))
        assert inner.lm_head.weight is inner.transformer.wte.weight
        ids = torch.arange(5)[None]
        assert torch.equal(inner.eval()(ids).logits, gpt2().eval()(ids).logits)
    assert model["inner"].lm_head.weight.dtype != torch.float32


def test_a_copy_is_fp32_with_nothing_of_the_masters(mode):
    model = gpt2()
    mw = wrap(model, *mode)
    ids = torch.arange(5)[None]
    mw.backward(model(ids, labels=ids).loss)
    mw.step()
    expected = masters(mw)
    before = model.eval()(ids).logits
    for twin in (copy.deepcopy(model), copy.deepcopy(nn.ModuleList([model]))[0]):
        assert same(dict(twin.named_parameters()), expected)
        assert twin.lm_head.weight is twin.transformer.wte.weight
        for module in twin.modules():
            tables = [v for k, v in vars(module).items() if "_hooks" in k and v]
            assert not tables and "save_pretrained" not in vars(module) and "__reduce_ex__" not in vars(module)
    assert copy.deepcopy(model.transformer.h[0]).mlp.c_fc.weight.dtype == torch.float32
    assert torch.equal(copy.deepcopy(model.lm_head.weight), expected["transformer.wte.weight"])
    twin.load_state_dict({n: torch.zeros_like(p) for n, p in twin.state_dict().items()})
    assert same(masters(mw), expected)
    assert torch.equal(model(ids).logits, before)
    mw.backward(model(ids, labels=ids).loss)
    assert mw.step()


def test_hooks_of_the_user_are_copied(mode):
    model = net()
    mw = wrap(model, *mode)
    model[0].register_forward_hook(lambda module, args, output: output * 0)
    twin = copy.deepcopy(model)
    assert len(twin[0]._forward_hooks) == 1
    assert torch.equal(twin(torch.randn(2, 8)), twin[2].bias.expand(2, 4))
    mw.release()
    assert "__reduce_ex__" not in vars(model) and "__deepcopy__" not in vars(model[0].weight)
    assert len(model[0]._forward_hooks) == 1 and not model._forward_hooks


@pytest.mark.parametrize("how", ["multi, exposed", "exposed", "one by one"])
def test_an_average_moves_as_in_fp32(how):
    """Steps of 1e-3 x difference are below bf16's resolution; an average kept in bf16 stays behind by half."""
    moved = {}
    for kind in ("fp32", "half"):
        model = net()
        mw = wrap(model, lr=1e-3) if kind == "half" else None
        optimizer = None if mw else torch.optim.AdamW(model.parameters(), lr=1e-3)
        fn = (
            {"multi_avg_fn": get_ema_multi_avg_fn(0.999)}
            if how.startswith("multi")
            else {"avg_fn": get_ema_avg_fn(0.999)}
        )
        average = AveragedModel(model, **fn)
        start = [p.clone() for p in average.parameters()]
        assert {p.dtype for p in average.parameters()} == {torch.float32}
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            x = torch.randn(16, 8, generator=generator)
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
            if mw is None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update_parameters(model)
                continue
            mw.backward(loss)
            mw.step()
            if how == "one by one":
                average.update_parameters(model)  # takes the half weights into an fp32 average
            else:
                with mw.exposed():
                    average.update_parameters(model)
        moved[kind] = sum(float((a - b).detach().square().sum()) for a, b in zip(average.parameters(), start)) ** 0.5
    assert moved["half"] == pytest.approx(moved["fp32"], rel=0.03)
    if how.startswith("multi"):
        with pytest.raises(RuntimeError, match="dtype"):  # never an average of rounded weights without a word
            average.update_parameters(model)


def test_loading_into_a_submodule_goes_to_the_masters(mode):
    model = gpt2()
    mw = wrap(model, *mode)
    block = {n: torch.randn_like(p) for n, p in model.transformer.h[0].state_dict().items()}
    model.transformer.h[0].load_state_dict(block)
    mw.sync()
    found = masters(mw)
    assert all(torch.equal(found[f"transformer.h.0.{n}"], x) for n, x in block.items())
    weight = model.transformer.h[0].mlp.c_fc.weight
    if mode[1] == "fp32":
        assert torch.equal(weight, block["mlp.c_fc.weight"].to(weight.dtype))
    untouched = "transformer.wpe.weight"
    assert torch.equal(found[untouched], dict(gpt2().named_parameters())[untouched])


def test_pretrained_models_are_saved_as_fp32_and_say_so(tmp_path, mode):
    model = gpt2()
    mw = wrap(model, *mode)
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float32"
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "a")
    assert again.dtype == torch.float32 and same(dict(again.named_parameters()), masters(mw))
    copied = GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert same(dict(copied.named_parameters()), masters(mw))
    half = copy.deepcopy(model).to(model.dtype)  # how half weights are written
    half.save_pretrained(tmp_path / "half")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "half").dtype == model.dtype != torch.float32
    assert model.transformer.wpe.weight.dtype == model.dtype


def test_a_base_model_is_saved_whole_too(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    model = BertForSequenceClassification(config)
    mw = wrap(model)
    model.bert.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) > 10 and same(tensors, {n: masters(mw)[f"bert.{n}"] for n in tensors})


def test_state_dicts_of_a_model_that_was_moved_are_the_masters(mode):
    """As Accelerate moves it: model.to(torch.device("cpu", 0)) copies every parameter."""
    model = net()
    mw = wrap(model, *mode)
    expected = masters(mw)
    for move in (torch.device("cpu", 0), torch.float32):
        model.to(move)
        assert same(model.state_dict(), expected)
        assert same(dict(copy.deepcopy(model).named_parameters()), expected)


def test_keep_vars_hands_out_the_parameters_themselves():
    model = net()
    wrap(model)
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight


def test_tracing_is_refused_and_works_on_fp32_weights(mode):
    model = net()
    mw = wrap(model, *mode)
    x = torch.randn(3, 8)
    for export in (torch.jit.trace, torch.export.export):
        with pytest.raises(UserError, match="traced for an export while it computes in half"):
            export(model, (x,))
    expected = net()(x)
    with mw.exposed():
        assert torch.equal(torch.jit.trace(model, (x,))(x), expected)
        assert {t.dtype for t in torch.export.export(model, (x,)).state_dict.values()} == {torch.float32}
    assert torch.equal(torch.jit.trace(copy.deepcopy(model), (x,))(x), expected)
