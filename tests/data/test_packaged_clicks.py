"""The made-up clicks: chances as their formula says, the best AUC that they allow, and the network that reads them."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from mptrain.data.load import load_data
from mptrain.data.sources import packaged, packaged_clicks
from mptrain.data.sources.dien import dien
from mptrain.data.sources.packaged_clicks import BAYES_AUC, ITEMS, KINDS, OFFERS, bayes_auc, name, rows
from mptrain.models.processor import load_processor
from mptrain.recipe import Data, Model

WORDS = 35


def test_chances_are_those_of_the_formula_and_clicks_are_drawn_by_them():
    drawn = list(islice(rows(), 4000))
    assert drawn == list(islice(rows(), 4000)) and {row[4] for row in drawn[:OFFERS]} == {"user-0000"}
    liked = np.random.default_rng(0).normal(0, 0.5, ITEMS)
    for item, history, _, chance, _ in drawn[:50]:
        seen, offered = [int(word[1:]) for word in history.split()], int(item[1:])
        weights = [0.5 ** ((len(seen) - 1 - t) / 3) for t in range(len(seen))]
        share = sum(w for w, h in zip(weights, seen) if h % KINDS == offered % KINDS) / sum(weights)
        assert chance == pytest.approx(1 / (1 + np.exp(-(liked[offered] - 2 + 5 * share))))
        assert 2 <= len(seen) <= 40
    clicks, chances = (np.array([row[place] for row in drawn], float) for place in (2, 3))
    spread = np.sqrt((chances * (1 - chances)).sum())
    assert abs(clicks.sum() - chances.sum()) < 3 * spread


def test_the_best_auc_is_the_mean_of_what_chances_score_on_drawn_clicks():
    draw = np.random.default_rng(0)
    chances = np.round(draw.beta(1, 2, 300), 1)  # with ties
    found = []
    for _ in range(400):
        clicks = draw.random(300) < chances
        k = clicks.sum()
        found.append((rankdata(chances)[clicks].sum() - k * (k + 1) / 2) / (k * (300 - k)))
    assert bayes_auc(chances) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 20)
    assert round(bayes_auc(np.array([row[3] for row in rows()])), 4) == BAYES_AUC
    assert str(BAYES_AUC) in str(packaged.note("packaged:clicks"))


def test_a_row_is_the_item_and_then_its_history_and_users_stay_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_clicks, "USERS", 40)
    tokenizer = load_processor(Model(path="packaged:dien", module="dien.py:dien", task="click-rate"), allow_code=True)
    assert len(tokenizer) == WORDS
    columns = {"text": "item", "text_pair": "history", "label": "click"}
    data = load_data(Data(source="packaged:clicks", max_length=12, **columns), "click-rate", tokenizer, seed=0)
    assert data.facts["groups"] == {"column": "user", "train": 28, "validation": 4, "test": 8, "crossing": 0}
    assert data.facts["bayes_auc"] == BAYES_AUC and max(data.facts["unknown_tokens"].values()) == 0
    words = [tokenizer.convert_ids_to_tokens(data.train[row]["input_ids"].tolist()) for row in range(len(data.train))]
    first = {(row[0], *row[1].split()[-11:]) for row in rows()}  # what is too long loses its oldest
    assert all(tuple(row) in first for row in words) and max(map(len, words)) == 12
    assert all(word in map(name, range(ITEMS)) for row in words for word in row)


def test_padding_holds_the_state_of_the_network():
    torch.manual_seed(0)
    model, ids = dien(WORDS).eval(), torch.randint(3, WORDS, (2, 9))
    mask = torch.ones_like(ids)
    longer = (nn.functional.pad(ids, (0, 6)), nn.functional.pad(mask, (0, 6)))
    assert torch.allclose(model(ids, mask), model(*longer), atol=1e-6)
    assert not torch.allclose(model(ids, mask), model(ids.flip(1), mask), atol=1e-3)
