"""The small OPT that recipes train when they are given none."""

import filecmp
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mptrain.core.errors import UserError
from mptrain.data.sources import packaged, packaged_opt
from mptrain.models.processor import load_processor
from mptrain.recipe import Model

TEXTS = ["a film that never quite works, and yet it is good", "the plot is thin; the cast isn't", "größer – naïve"] * 40


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "fetch_package", lambda package, cache: tmp_path / "reviews.csv")
    rows = [f'fresh,"{text} {i}",film {i}' for i, text in enumerate(TEXTS)]
    (tmp_path / "reviews.csv").write_text("\n".join(["category,text,movie_name", *rows]) + "\n")
    assert packaged.cached("packaged:opt-untrained") is None
    return packaged.fetch("packaged:opt-untrained")


def test_it_is_an_ordinary_model(made):
    model = AutoModelForCausalLM.from_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) < 1.2e6
    for text in [*TEXTS[:3], "unseen: 'Ω' \n\n two  spaces"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < model.config.vocab_size
    assert load_processor(Model(path="packaged:opt-untrained", task="causal-lm")).pad_token_id == 0
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_it_is_made_once_and_always_the_same(made, tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in made.iterdir()}
    assert packaged.fetch("packaged:opt-untrained") == packaged.cached("packaged:opt-untrained") == made
    assert {p.name: p.stat().st_mtime_ns for p in made.iterdir()} == before
    packaged_opt.make(tmp_path / "reviews.csv", tmp_path / "again")
    same, different, errors = filecmp.cmpfiles(made, tmp_path / "again", os.listdir(made), shallow=False)
    assert len(same) == len(before) and not different and not errors


def test_unknown_names_list_it():
    with pytest.raises(UserError, match="packaged:opt-untrained"):
        packaged.fetch("packaged:nothing")
