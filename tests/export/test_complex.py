"""Complex numbers of a model's code, written out in real arithmetic for every format; what cannot be is named."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn

from mptrain.core.errors import ExportError
from mptrain.core.signature import BATCH, Port, Signature, probed
from mptrain.data.sources.modeling_aquila import AquilaConfig, AquilaForCausalLM, rotated, rotations
from mptrain.export.base import Source
from mptrain.export.formats import FORMATS, format_of
from mptrain.export.openvino.runner import CachedIr
from mptrain.export.openvino.write import write
from mptrain.export.torch.complex_numbers import RealArithmetic, real_arithmetic
from mptrain.recipe import EXPORTS
from mptrain.verify import parity

SHAPES = {"coreml": {"shapes": {"kind": "ranged", "batch": [1, 8], "length": [1, 40]}}}


def aquila():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AquilaConfig(**sizes, num_attention_heads=4, max_position_embeddings=80, initializer_range=0.3)
    return AquilaForCausalLM(config).eval()


def texts(rows=3, length=9, seed=0):
    ids = torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Buffered(nn.Module):
    """Turns kept as a buffer, or made once as an attribute, as the first LLaMA does."""

    def __init__(self, place: str) -> None:
        super().__init__()
        turns = rotations(torch.arange(16)[None], 8, 10_000.0)[0]
        if place == "buffer":
            self.register_buffer("turns", turns, persistent=False)
        else:
            self.turns = turns
        self.lift = nn.Linear(1, 8)

    def forward(self, x):
        turned = torch.view_as_complex(self.lift(x[..., None]).reshape(*x.shape, 4, 2))
        turned = turned * self.turns[: x.shape[1]][None]
        turned = torch.cat([turned, turned.conj()], -1) + 1j * turned.abs()[..., :1]
        return {"y": torch.view_as_real(turned).flatten(2)}


def test_a_rotation_in_real_arithmetic_is_the_same():
    x, places = torch.randn(2, 9, 4, 8), torch.arange(9)[None]
    expected = rotated(x, rotations(places, 8, 10_000.0))
    with RealArithmetic():
        found = rotated(x, rotations(places, 8, 10_000.0))
    assert type(found) is torch.Tensor and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("place", ["buffer", "attribute"])
def test_complex_tensors_of_a_module_are_split_and_put_back(place):
    model, x = Buffered(place).eval(), torch.randn(2, 7)
    expected, turns = model(x)["y"], model.turns
    with real_arithmetic(model, lambda: model(x)):
        assert not isinstance(model.turns, torch.Tensor)
        assert (model(x)["y"] - expected).abs().max() < 1e-5
    assert model.turns is turns and ("turns" in dict(model.named_buffers())) == (place == "buffer")


class Spectral(nn.Module):
    def forward(self, x):
        found = torch.fft.rfft(x)
        return torch.view_as_real(torch.sinh(found)).flatten(1)


def test_all_that_has_no_real_form_is_named_at_once():
    with (
        pytest.raises(ExportError, match=r"complex numbers.*not fft_rfft, sinh"),
        real_arithmetic(Spectral(), lambda: Spectral()(torch.randn(2, 8))),
    ):
        pass


def test_a_model_without_any_is_traced_as_ever():
    plain = nn.Linear(2, 2)
    with real_arithmetic(plain, lambda: plain(torch.ones(1, 2))):
        from torch.overrides import _get_current_function_mode_stack

        assert not any(isinstance(mode, RealArithmetic) for mode in _get_current_function_mode_stack())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [pytest.param("rotary", marks=pytest.mark.long), "buffer"])
def test_every_format_takes_them(name, case):
    if case == "rotary":
        model, batch, other = aquila(), texts(), texts(2, 13, 1)
        signature = probed(model, batch)
    else:
        model, batch, other = Buffered("buffer").eval(), {"x": torch.randn(3, 9)}, {"x": torch.randn(2, 13)}
        signature = Signature((Port("x", (BATCH, "frames")),), (Port("y", (BATCH, "frames", 16)),))
    spec = EXPORTS[name].model_validate({"id": "x", "format": name, "of": ["model"], **SHAPES.get(name, {})})
    kind = format_of(spec)
    source = Source(lambda: model, signature, batch, "fp32", "fp32", False, lambda: [batch])
    with TemporaryDirectory() as folder:
        found = kind.write(source, Path(folder))
        with closing(kind.open(found.path, source)) as runner:
            compared = parity.compare(model, runner, [batch, other], signature=signature)
    assert compared["relative"] < 1e-5, compared


def test_it_generates_with_a_cache_as_torch_does(tmp_path):
    model, new = aquila(), 24
    done = write(model, texts(), tmp_path, precision="fp32", cache=60)
    ids = texts()["input_ids"][1:]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with closing(CachedIr(done.xml, 60)) as runner:
        runner.reset()
        found, call = ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for _ in range(new):
            token = torch.as_tensor(runner.step(call)["logits"][:, -1].argmax(-1))[:, None]
            found = torch.cat([found, token], 1)
            call = {"input_ids": token, "attention_mask": torch.ones_like(found)}
        assert runner.facts().fused_attention == 2
    assert found.equal(expected)
    with torch.no_grad():
        assert np.isfinite(model(found).logits.numpy()).all()
