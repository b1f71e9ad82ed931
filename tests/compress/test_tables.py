"""Rows of embeddings are rounded in training exactly as exports store them."""

import pytest
import torch
from kit.tiny_models import inputs, logits, tiny
from torch import nn

from mptrain.compress.quantize import placement, quantizers
from mptrain.compress.quantize.integers import activations_only, rounded_tables, weight_only
from mptrain.compress.quantize.tables import GRID, RowQuantizer
from mptrain.compress.weights import records
from mptrain.compress.weights.grid import round_to_nearest
from mptrain.recipe import Ptq, Qat

TABLES = {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}


def quantized(family="bert", mode="qat", **options):
    config = Qat(mode="qat", **options) if mode == "qat" else Ptq(mode="ptq", **options)
    return quantizers.quantize(tiny(family), config, [inputs(family, seed=i) for i in range(2)])


def rounded(model):
    return {m.table for m in model.modules() if isinstance(m, RowQuantizer)}


def test_a_row_has_the_values_of_its_record_and_passes_gradients_on():
    rows = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    rows[0, 0], rows[1, 1, 2] = 0, 40.0  # a row of zeros, and one with an outlier
    rows.requires_grad_()
    y = RowQuantizer("t")(rows)
    assert torch.equal(y.detach().flatten(0, 1), round_to_nearest(rows.detach().flatten(0, 1), GRID).dense())
    assert 0 < (y - rows).abs().max() < 0.51 * 40 / 127
    again = RowQuantizer("t")(y.detach())
    assert torch.equal(again, y.detach()), "rounding once more changes nothing"
    y.backward(torch.arange(24.0).expand_as(y))
    assert torch.equal(rows.grad, torch.arange(24.0).expand_as(y))


@pytest.mark.parametrize("mode", ["qat", "ptq"])
def test_every_table_that_an_export_stores_is_rounded(mode):
    model = quantized(mode=mode)
    assert rounded(model) == TABLES
    assert rounded(quantized(mode=mode, embeddings="fp32")) == set()


def test_the_table_of_tokens_in_int4_is_not_rounded_again():
    assert rounded(quantized(embeddings="int4")) == TABLES - {"bert.embeddings.word_embeddings"}


def test_a_table_that_is_a_quantized_head_is_left_to_the_heads_quantizer():
    model = quantized("gpt2")
    assert rounded(model) == {"transformer.wpe"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_traced_copies_compute_what_the_model_does(family):
    model = quantized(family)
    assert rounded(model)
    batch, expected = inputs(family, seed=5), logits(model, inputs(family, seed=5))
    copies = [
        quantizers.frozen(model),
        rounded_tables(model)[0],
        activations_only(model, embeddings="int8", stands=lambda q: q),
        activations_only(model, embeddings="fp32", stands=lambda q: q),
    ]
    for copied in copies:
        assert not rounded(copied) and torch.equal(logits(copied, batch), expected)
    assert rounded(model), "the model itself is left alone"
    plain = weight_only(model, embeddings="int8")
    for name in rounded(model):
        table = records.of(plain)[f"{name}.weight"].dense()
        assert torch.equal(plain.get_submodule(name).weight, table)
        assert not torch.equal(model.get_submodule(name).weight, table)


def test_one_that_stays_as_it_is_has_no_record():
    model = quantized()
    made, found = rounded_tables(model, embeddings="int8", leave={"bert.embeddings.word_embeddings"})
    assert {f"{name}.weight" for name in TABLES} - set(found) == {"bert.embeddings.word_embeddings.weight"}
    assert torch.equal(made.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_quantizer_of_the_rows_values_comes_after_them():
    """A Linear that reads what was looked up."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.layer = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids):
            return {"logits": self.layer(self.table(ids))}

    model = Looks().eval()
    ids = {"ids": torch.arange(9).view(3, 3)}
    found = quantizers.quantize(model, Qat(mode="qat"), [ids])
    hooks = {id(module): names for names, module in placement.hooks(found)}
    assert rounded(found) == {"table"} and len(hooks) == 3
    order = []
    for _, module in placement.hooks(found):
        module.register_forward_hook(lambda m, args, out: order.append(type(m).__name__))
    found(**ids)
    assert order[0] == "RowQuantizer" and order.count("FakeQuantizer") == 2
    again = quantizers.attach(Looks().eval(), quantizers.config_of(found))
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(**ids)["logits"], found(**ids)["logits"])
