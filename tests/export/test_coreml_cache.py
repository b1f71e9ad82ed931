"""Core ML packages with a key-value cache as states, run call by call in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kit.long import except_for
from kit.tiny_models import tiny
from transformers import DynamicCache

from mptrain.compress.weights import records
from mptrain.compress.weights.records import BlockQuantized, Palettized
from mptrain.core.errors import UserError
from mptrain.export.coreml.cached import export_decoder
from mptrain.mil.interpreter import Interpreter, weights

PLACES = 12


def fed(runner, text, pieces):
    """Logits of a text [1, n] that goes in piece by piece."""
    runner.reset()
    found = [runner({"input_ids": part, "position": torch.tensor([start])})["logits"] for start, part in pieces(text)]
    return torch.cat([torch.as_tensor(part) for part in found], 1)


def one_by_one(text):
    return [(i, text[:, i : i + 1]) for i in range(text.shape[1])]


def prompt_first(text):
    return [(0, text[:, :5]), (5, text[:, 5:6]), (6, text[:, 6:9]), (9, text[:, 9:])]


def whole(model, text):
    with torch.no_grad():
        return model(input_ids=text).logits


class HalfCache(DynamicCache):
    def update(self, keys, values, *rest, **more):
        return super().update(keys.half().float(), values.half().float(), *rest, **more)


@pytest.mark.parametrize("attn", except_for(["sdpa", "eager"], ["sdpa"]))
@pytest.mark.parametrize("family", except_for(["opt", "llama"], ["llama"]))
def test_call_by_call_is_the_whole_text_at_once(family, attn, tmp_path):
    model = tiny(family, attn)
    package = export_decoder(model, tmp_path / "out", max_length=PLACES).package
    exact, stored = Interpreter(package, "fp32"), Interpreter(package)
    heads = {"opt": 4, "llama": 2}[family]
    states = {name: (result.shape, result.dtype) for name, result in stored.program.states.items()}
    names = [f"{kind}_{layer}" for layer in range(2) for kind in ("key", "value")]
    assert states == dict.fromkeys(names, ((1, heads, PLACES, 8), "FLOAT16"))
    assert {"read_state", "write_state", "slice_update"} <= {op.type for op in stored.program.operations()}
    for seed in (1, 2):  # the second text begins in a cache that holds the first
        text = torch.randint(4, 50, (1, PLACES), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            rounded = model(input_ids=text, past_key_values=HalfCache(config=model.config), use_cache=True).logits
        for pieces in (one_by_one, prompt_first):
            assert (fed(exact, text, pieces) - whole(model, text)).abs().max() < 1e-5
            found = fed(stored, text, pieces)  # float16 is in the states alone; a last digit may round the other way
            assert (found - rounded).abs().max() < 0.1 * (found - whole(model, text)).abs().max() < 1e-3


@pytest.mark.parametrize("family", except_for(["opt", "llama"], ["llama"]))
def test_in_float16_one_token_to_a_call(family, tmp_path):
    model = tiny(family)
    package = export_decoder(model, tmp_path / "out", max_length=PLACES, tokens=1, precision="fp16").package
    runner = Interpreter(package)
    text = torch.randint(4, 50, (1, PLACES), generator=torch.Generator().manual_seed(3))
    found, expected = fed(runner, text, one_by_one), whole(model, text)
    assert torch.nn.functional.cosine_similarity(found, expected, -1).min() > 0.9999
    with pytest.raises(UserError, match=r"input_ids: int32 \[1, 1\]"):
        runner({"input_ids": text[:, :2], "position": torch.tensor([0])})


@pytest.mark.long
def test_a_new_text_needs_no_reset(tmp_path):
    model = tiny("llama")
    runner = Interpreter(export_decoder(model, tmp_path / "out", max_length=PLACES).package, "fp32")
    for seed, length in ((1, PLACES), (2, 7)):
        text = torch.randint(4, 50, (1, length), generator=torch.Generator().manual_seed(seed))
        found = torch.as_tensor(runner({"input_ids": text, "position": torch.tensor([0])})["logits"])
        assert (found - whole(model, text)).abs().max() < 1e-5


def test_compressed_weights_stay_stored(tmp_path):
    model = tiny("llama")
    draw = torch.Generator().manual_seed(1)
    rows, columns = model.lm_head.weight.shape
    lut = torch.randn(1, 16, 1, generator=draw) / 8
    indices = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    q = torch.randint(-8, 8, (32, 32), generator=draw, dtype=torch.int8)
    blocks = BlockQuantized(q, torch.rand(32, 2, generator=draw) / 40, None, 4)
    held = {"lm_head.weight": Palettized(indices, lut, rows, None, 4), "model.layers.0.self_attn.o_proj.weight": blocks}
    records.attach(model, held)
    runner = Interpreter(export_decoder(model, tmp_path / "out", max_length=PLACES).package, "fp32")
    stored = {op.type: parts for op, parts in weights(runner.program)}
    assert stored["constexpr_lut_to_dense"]["indices"] == ("UINT4", rows * columns)
    assert stored["constexpr_blockwise_shift_scale"]["data"] == ("INT4", 32 * 32)
    text = torch.randint(4, 50, (1, PLACES), generator=draw)
    assert (fed(runner, text, prompt_first) - whole(model, text)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"target": "iOS17"}, "needs minimum_deployment_target iOS18: iOS17 has no states"),
        ("llama", {"max_length": 41}, "max_length 41 must be 1 to 40"),
        ("llama", {"tokens": 9}, "tokens 9 of a call must be 1 to max_length, 8"),
        ("bert", {}, "causal LM, got BertForSequenceClassification"),
    ],
)
def test_what_does_not_fit_is_refused(family, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_decoder(tiny(family), tmp_path / "out", **{"max_length": 8, **changes})
    assert not (tmp_path / "out").exists()
