"""FP16 packages of Core ML: what overflows is found, kept in float32 with few casts, and checked."""

from __future__ import annotations

import pytest
import torch
from test_export_coreml import RANGED, TwoOutputs, small, texts
from torch import nn

from mptrain.errors import ExportError
from mptrain.export import coreml
from mptrain.export.coreml import export_coreml
from mptrain.verify.mil import Interpreter
from mptrain.verify.mil_facts import facts
from mptrain.verify.mil_half import spellings
from mptrain.verify.overflow import compare


class UForm(TwoOutputs):
    """Attention whose mask is (1 - m) * finfo.min, in a text encoder with two outputs."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, input_ids, attention_mask):
        mask = (1.0 - attention_mask.float()[:, None, None, :]) * torch.finfo(torch.float32).min
        hidden = self.table(input_ids)
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-1, -2) / 8**0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        features = self.down(torch.nn.functional.gelu(self.up(hidden + mixed)))
        return {"features": features, "embeddings": torch.nn.functional.normalize(features[:, 0], dim=-1)}


class BigNorm(nn.Module):
    """An RMSNorm whose squares overflow: no NaN, only zeros."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)
        self.table.weight.data *= 1000

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        return {"logits": self.out(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))}


class Exponential(nn.Module):
    """log(1 + exp(x)) with x up to about 20: exp overflows fp16 from 11.1 on, the result does not."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)
        self.table.weight.data = 12 + 8 * torch.sin(self.table.weight.data)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.out(torch.log(1 + torch.exp(self.table(input_ids))))}


class Softplus(Exponential):
    def forward(self, input_ids, attention_mask):
        return {"logits": self.out(nn.functional.softplus(self.table(input_ids)))}


def kept(model, tmp_path, batches=None, **options):
    batches = batches or [texts(2, 9, seed=1), texts(3, 5, seed=2)]
    return export_coreml(
        model.eval(), texts(2, 9), tmp_path / "out", precision="fp16", shapes=RANGED, calibration=batches, **options
    )


@pytest.mark.parametrize("route", ["export", "trace"])
def test_the_mask_of_uform_is_found_with_two_casts(route, tmp_path):
    torch.manual_seed(0)
    model = UForm()
    done = kept(model, tmp_path, route=route)
    assert not done.half["all_half"]["finite"]
    assert len(done.half["kept_fp32"]) == 1 and done.half["float_casts"] <= 2
    assert done.half["said"].startswith("1 op in FP32: ") and "float↔half casts" in done.half["said"]
    runner = Interpreter(done.package)
    assert facts(runner.program)["fp32_operations"]
    batch = texts(4, 12, seed=7)
    with torch.no_grad():
        expected = model(**batch)
    found = {name: torch.as_tensor(value).float() for name, value in runner(batch).items()}
    assert compare(expected, found).cosine > 0.9999


def test_squares_that_overflow_without_a_nan_are_found(tmp_path):
    done = kept(BigNorm(), tmp_path)
    assert done.half["all_half"]["finite"] and done.half["all_half"]["cosine"] < 0.9
    assert done.half["kept_fp32"] and done.half["executed"]["cosine"] > 0.9999


def test_an_exponential_that_overflows_is_found(tmp_path):
    torch.manual_seed(0)
    done = kept(Exponential(), tmp_path)
    assert not done.half["all_half"]["finite"]
    assert 1 <= len(done.half["kept_fp32"]) <= 3 and done.half["executed"]["cosine"] > 0.9999


def test_softplus_of_large_values_is_right_in_half(tmp_path):
    torch.manual_seed(0)
    done = kept(Softplus(), tmp_path)
    assert done.half["executed"]["finite"] and done.half["executed"]["cosine"] > 0.9999


def test_a_left_padded_eager_llama_is_right_in_half(tmp_path):
    """Rows of padding see nothing but the mask: with finfo.min that is NaN in fp16; the export makes masks finite."""
    batches = [texts(3, length, seed=length) for length in (9, 6)]
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    model = small("llama", "eager")
    done = kept(model, tmp_path, batches)
    found = Interpreter(done.package)(batches[0])["logits"]
    with torch.no_grad():
        expected = model(**batches[0]).logits
    real = batches[0]["attention_mask"].bool()
    cosine = torch.nn.functional.cosine_similarity(torch.as_tensor(found).float()[real], expected[real]).min()
    assert cosine > 0.9999 and done.half["executed"]["finite"]
    assert done.half["float_casts"] <= 6


def test_a_harmless_model_stays_in_half(tmp_path):
    done = kept(small("bert"), tmp_path)
    assert done.half["kept_fp32"] == {} and done.half["said"] == "0 ops in FP32; 0 float↔half casts"


def test_a_package_that_stays_wrong_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(coreml, "spellings", lambda name: set())
    with pytest.raises(ExportError, match="the fp16 package is wrong on the calibration batches"):
        kept(UForm(), tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_of_the_file_and_of_the_conversion():
    assert {"348", "op_348", "var_348"} <= spellings("348")
    assert {"var_348", "348"} <= spellings("var_348") and "x.1" in spellings("x_1")
