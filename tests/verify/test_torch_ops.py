"""Finding the ops to keep in fp32 in torch models: known traps, and brute force beside the search."""

from __future__ import annotations

import copy

import pytest
import torch
from kit import tiny_models
from kit.text_encoder import TextEncoder, build
from torch import nn

from mptrain.verify.overflow import search
from mptrain.verify.programs.aten import TorchOps
from mptrain.verify.ranges import HALF_MAX


class RmsNorm(nn.Module):
    """Hidden states of about 1500, as large language models have: x² is 2e6."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        h = self.up(x) * 1500
        return self.down(self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)))


class Softplus(nn.Module):
    def forward(self, x):
        return torch.log1p(torch.exp(x)) / 20


def left_padded(batch):
    return {**batch, "attention_mask": batch["attention_mask"].flip(1)}


def brute_force(program):
    """The ops that heal the program alone."""
    from mptrain.verify.overflow import compare

    names = {op.name for op in program.ops}
    reference = program.run(0, names)
    return [op.name for op in program.ops if compare(reference, program.run(0, {op.name})).right()]


def test_uform_mask_is_found_with_two_casts():
    program = TorchOps(build(TextEncoder), [tiny_models.inputs("bert")])
    found = search(program)
    assert not found.before.finite, "0 * -inf"
    assert found.keep == ("mul",) and found.casts == 2
    assert found.after.finite and found.after.cosine > 0.9999 and found.after.max_diff < 0.02
    assert found.reasons == {"mul": "largest |x| 3.4e+38"}
    assert brute_force(program) == ["mul"]


def test_the_set_does_not_grow_with_the_layers():
    assert search(TorchOps(build(TextEncoder, 5), [tiny_models.inputs("bert")])).keep == ("mul",)


class FilledMask(TextEncoder):
    """The same mask, filled in place; no product, so no NaN where a row keeps a key."""

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        bias = torch.zeros(attention_mask.shape)
        bias.masked_fill_(attention_mask == 0, torch.finfo(torch.float32).min)
        scores = x @ x.transpose(1, 2) / 8 + bias[:, None, :]
        return torch.softmax(scores, -1) @ x


def test_a_filled_finfo_min_mask_is_only_wrong_where_a_row_sees_nothing():
    model, batch = build(FilledMask), tiny_models.inputs("bert")
    harmless = search(TorchOps(model, [batch]))
    assert harmless.keep == () and harmless.before.right()
    assert max(r.largest for r in harmless.ranges.values()) > 1e38
    empty = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].clone()}
    empty["attention_mask"][0] = 0
    program = TorchOps(_Unmasked(model), [empty])
    found = search(program)
    assert not found.before.finite and found.after.right()
    assert {op.rpartition("/")[2] for op in found.keep} == {"masked_fill_", "add", "_softmax"}


class _Unmasked(nn.Module):
    """All rows count, padding too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).flatten(0, 1)


def test_left_padded_eager_llama():
    batch = left_padded(tiny_models.inputs("llama"))
    found = search(TorchOps(tiny_models.tiny("llama", "eager", use_cache=False), [batch]))
    assert not found.before.finite and found.after.right() and found.after.cosine > 0.9999
    kinds = {op.rpartition("/")[2].split(".")[0] for op in found.keep}
    assert kinds == {"where", "add", "_softmax"}, "the mask, the scores with it and their softmax"
    sdpa = search(TorchOps(tiny_models.tiny("llama", "sdpa", use_cache=False), [batch]))
    assert sdpa.keep == () and sdpa.before.right()


def test_rms_norm_goes_wrong_without_nan():
    found = search(TorchOps(build(RmsNorm), [{"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(1))}]))
    assert found.before.finite and found.before.cosine < 0.9, "not finite is not the test"
    assert {"pow", "mean", "rsqrt"} <= set(found.keep) <= {"pow", "mean", "add", "rsqrt"}
    assert found.after.right() and found.after.cosine > 0.9999
    assert found.ranges["pow"].largest > 1e6 and found.ranges["pow"].overflow > 0.5


def test_softplus_and_exp():
    x = torch.linspace(-20, 20, 100).reshape(10, 10)
    found = search(TorchOps(Softplus(), [{"x": x}]))
    assert found.keep == ("exp", "log1p") and found.after.right()
    assert found.casts == 1, "only the result: x is fp32 already"
    fused = search(TorchOps(nn.Softplus(), [{"input": x}]))
    assert fused.keep == () and fused.before.right()


@pytest.mark.parametrize("family", ["bert", "vit", "opt", "wav2vec2"])
def test_rounding_is_what_a_half_model_does(family):
    """All ops in fp16 against model.half(), whose kernels also compute in fp32 and round their results."""
    model, batch = tiny_models.tiny(family, use_cache=False), tiny_models.inputs(family)
    program = TorchOps(model, [batch])
    half = copy.deepcopy(model).half()
    cast = {k: v.half() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        true = half(**cast).logits.float()
        exact = model(**batch).logits
    if true.shape[:2] == batch.get("attention_mask", torch.zeros(0)).shape:
        true, exact = (t[batch["attention_mask"].bool()] for t in (true, exact))
    ours = program.run(0, ())["logits"]
    assert not torch.equal(ours, exact)
    assert (ours - true).abs().max() <= 2 * (exact - true).abs().max() + 2**-10 * exact.abs().max()
    everything = {op.name for op in program.ops}
    assert torch.equal(program.run(0, everything)["logits"], exact)


def test_values_seen_are_rounded_and_readers_of_fp32_round_for_themselves():
    class Steps(nn.Module):
        def forward(self, x):
            y = x * 100_000.0
            y = y.view(-1)
            y.mul_(0.01)
            return torch.cat([y, y + 1])

    program = TorchOps(Steps(), [{"x": torch.tensor([[1.0003, 2.0]])}])
    assert [op.name for op in program.ops] == ["mul", "mul_", "add", "cat"]
    assert program.ops[1].inputs == ("mul",) and program.ops[3].inputs == ("mul_", "add")
    seen = {}
    program.run(0, {"mul"}, lambda op, value: seen.update({op: value.clone()}))
    assert torch.equal(seen["mul"], torch.tensor([[1.0003, 2.0]]) * 100_000.0)
    # mul_ writes in place: it reads its operand as it is, the factor 0.01 as fp16 has it, and rounds its result
    assert torch.equal(seen["mul_"], (seen["mul"].view(-1) * torch.tensor(0.01).half().item()).half().float())
    program.run(0, (), lambda op, value: seen.update({op: value.clone()}))
    assert torch.isinf(seen["mul"]).all() and seen["mul"].dtype == torch.float32
    assert HALF_MAX < 100_000


def test_the_model_is_left_as_it_was():
    model, batch = tiny_models.tiny("bert"), tiny_models.inputs("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = tiny_models.logits(model, batch)
    search(TorchOps(model, [batch]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(tiny_models.logits(model, batch), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
