"""An embedding as a product: the best of its rank for what is read, saved, exported and left whole by pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from kit.architectures import build, without_loss
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import mptrain
from mptrain.compress.quantize.embedding import table_of
from mptrain.compress.structure import low_rank, saved
from mptrain.compress.structure.find import find_structure
from mptrain.compress.vocabulary.cut import cut
from mptrain.core.embeddings import token_embedding
from mptrain.core.errors import ModelError

NAMES = ["bert", "roberta", "distilbert", "mpnet", "deberta-v2", "electra", "modernbert"]
RANK = 16


def counts(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, (token_embedding(model).num_embeddings,), generator=generator)


def made(name: str):
    model, batch = build(name)
    model.eval()
    share = low_rank.factorize(model, RANK, counts(model))
    saved.remember_modules(model)
    return model, without_loss(name, batch), share


def test_no_other_product_of_that_rank_has_less_error_over_what_is_read():
    model, _ = build("bert")
    old = token_embedding(model).weight.detach().double().clone()
    read = counts(model).double() + 1
    share = low_rank.factorize(model, RANK, counts(model))
    table = model.get_input_embeddings()
    new = table(torch.arange(len(old))).detach().double()
    error = (read[:, None] * (new - old).square()).sum()
    mean = (read[:, None] * old).sum(0) / read.sum()
    spectrum = torch.linalg.svdvals(read.sqrt()[:, None] * (old - mean))  # Eckart & Young
    best = spectrum[RANK:].square().sum()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)
    torch.testing.assert_close(share, float(1 - best / spectrum.square().sum()), rtol=1e-6, atol=0)


def test_the_same_twice_and_no_sign_is_left_to_chance():
    first, second = made("bert")[0], made("bert")[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    widen = first.get_input_embeddings().widen.weight
    assert (widen.gather(0, widen.abs().argmax(0, keepdim=True)) > 0).all()


def test_all_of_it_is_there_where_rows_have_that_rank():
    model, batch = build("bert")
    table = token_embedding(model)
    with torch.no_grad():
        table.weight.copy_(table.weight[:, :8] @ torch.randn(8, table.embedding_dim))
        before = model.eval()(**without_loss("bert", batch)).logits
        assert low_rank.factorize(model, RANK, counts(model)) == pytest.approx(1.0)
        torch.testing.assert_close(model(**without_loss("bert", batch)).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_by_us_and_by_transformers(name, tmp_path):
    model, batch, share = made(name)
    assert 0.3 < share < 1
    mptrain.save(model, tmp_path / "m")
    loaded = [mptrain.load(tmp_path / "m")]
    if name == "bert":
        loaded.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", trust_remote_code=True).eval())
    for other in loaded:
        for (n, a), (m, b) in zip(model.named_parameters(), other.named_parameters()):
            assert n == m and torch.equal(a, b)
        with torch.no_grad():
            a, b = model(**batch), other(**batch)
        assert all(torch.equal(x, y) for x, y in zip(a.to_tuple(), b.to_tuple()) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_its_rank_is_no_unit_that_pruning_takes(name):
    whole, batch = build(name)
    before = {block.name: block.units for block in find_structure(whole, without_loss(name, batch))}
    model, batch, _ = made(name)
    assert {block.name: block.units for block in find_structure(model, batch)} == before


def test_tokens_are_cut_after_it_too():
    model, batch, _ = made("bert")
    size = token_embedding(model).num_embeddings
    kept = [i for i in range(size) if i < 8 or i % 3]
    done = cut(model, kept, batch)
    assert token_embedding(done).weight.shape == (len(kept), RANK) and done.config.vocab_size == len(kept)


def test_code_that_reads_the_weight_of_its_embedding_reads_the_whole_table():
    model, _, _ = made("bert")
    table = model.get_input_embeddings()
    assert table.weight.shape == (table.num_embeddings, table.embedding_dim)
    torch.testing.assert_close(table.weight, table(torch.arange(table.num_embeddings)))
    table.weight[3].sum().backward()
    assert table.table.weight.grad[3].any() and table.widen.weight.grad.any()
    assert "weight" not in dict(table.named_parameters())


def test_int4_rounds_the_narrow_table():
    model = made("bert")[0]
    assert table_of(model) is model.get_input_embeddings().table


def test_a_table_that_is_no_wider_stays():
    model, _ = build("bert")
    before = model.get_input_embeddings()
    assert low_rank.factorize(model, 32, counts(model)) is None and model.get_input_embeddings() is before


def test_what_cannot_be_a_product_is_refused():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    with pytest.raises(ModelError, match=r"vocabulary\.rank: bert.embeddings.word_embeddings and cls.*share"):
        low_rank.check(BertForMaskedLM(BertConfig(**sizes)), "vocabulary.rank")
    model, _ = build("bert")
    low_rank.check(copy.deepcopy(model).to("meta"), "vocabulary.rank")
    with pytest.raises(ModelError, match=r"is a product already"):
        low_rank.check(made("bert")[0], "vocabulary.rank")
    model.get_input_embeddings = lambda: nn.Linear(3, 3)
    with pytest.raises(ModelError, match="is no plain table"):
        low_rank.check(model, "vocabulary.rank")


@pytest.mark.parametrize(
    "one", [{"kind": "low_rank", "size": 32}, {"kind": "low_rank", "size": 0}, {"kind": "other", "size": 3}]
)
def test_a_folder_cannot_put_anything_else_there(one):
    model, _ = build("bert")
    description = {"version": 3, "blocks": {}, "tensors": {}, "attributes": {}}
    with pytest.raises(ModelError, match=r"modules\.bert\.embeddings\.word_embeddings does not fit"):
        saved.apply(model, description | {"modules": {"bert.embeddings.word_embeddings": one}})
    with pytest.raises(ModelError, match="does not fit"):
        saved.apply(model, description | {"modules": {"classifier": {"kind": "low_rank", "size": 16}}})
