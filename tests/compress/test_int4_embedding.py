"""The token embedding in int4 during training: on a lattice that the export finds again, and standing still."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from kit.tiny_models import inputs, tiny
from torch import nn

from mptrain.compress.base import Site, Tools
from mptrain.compress.methods import method_class, stand_still
from mptrain.compress.quantize import embedding
from mptrain.core.errors import UserError
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.recipe import Qat
from mptrain.verify import parity

INT4 = Qat(mode="qat", embeddings="int4", reduce_range=True)


def test_a_lattice_is_found_again_and_closer_than_the_largest_value_gives():
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) ** 3
    weight[3] = 0
    once = embedding.rounded(weight)
    assert torch.equal(embedding.rounded(once), once) and torch.equal(once[3], weight[3])
    groups = weight.view(50, 2, 64)
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = (groups / scale).round().clamp(-8, 7).nan_to_num() * scale
    assert (once - weight).norm() < 0.99 * (plain.view(50, 128) - weight).norm()
    levels = (once.view(50, 2, 64) / once.view(50, 2, 64).abs().amax(-1, keepdim=True) * 8)[4:]
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.abs().max() == 8


def test_the_export_stores_the_table_that_was_trained_with(tmp_path):
    def model():
        found = tiny("bert", hidden_size=64, intermediate_size=64)
        for name in ("position_embeddings", "token_type_embeddings"):  # int8 in the file alone, which is no matter here
            nn.init.zeros_(found.bert.embeddings.get_submodule(name).weight)
        return found

    made = method_class(INT4)(INT4).prepare(model(), Tools(inputs=lambda: [inputs("bert")]))
    before, after = (m.get_input_embeddings().weight for m in (model(), made))
    assert 0.01 < (before - after).norm() / before.norm() < 0.2
    done = export_openvino(made.eval(), inputs("bert"), tmp_path / "ov", precision="int8_emb4", embeddings="int8")
    with closing(CompiledIr(done.xml, threads=1)) as runner:
        assert parity.compare(made, runner, [inputs("bert", seed=3)])["max_abs_diff"] < 1e-5


def test_the_table_stands_still_in_all_phases_and_nothing_else_does():
    model = tiny("bert")
    stand_still([INT4], model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["bert.embeddings.word_embeddings.weight"]
    stand_still([INT4], model, still=False)
    assert all(p.requires_grad for p in model.parameters())
    stand_still([Qat(mode="qat")], model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda: tiny("gpt2"), "a head shares the token embedding"),
        (lambda: tiny("bert", hidden_size=134, num_attention_heads=2), "width 134 has no groups"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential has no token embedding"),
        (lambda: tiny("wav2vec2"), "has no token embedding"),  # transformers raises where a model has none
    ],
)
def test_what_cannot_be_is_refused_before_training(broken, why):
    with pytest.raises(UserError, match=f"quantize.embeddings: .*{why}"):
        method_class(INT4).check(INT4, broken(), Site("quantize", 8))
