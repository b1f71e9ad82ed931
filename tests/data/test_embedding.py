"""Embeddings: pooling, retrieval and the contrastive loss against plain loops, data in all shapes, errors by row."""

from __future__ import annotations

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from kit import tiny
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from torch.nn.functional import cosine_similarity, normalize
from transformers import BertConfig, BertForSequenceClassification, BertModel

import mptrain
from mptrain.core.errors import DataError, ModelError
from mptrain.data.load import load_data
from mptrain.data.tasks.embedding import Embedding
from mptrain.data.tasks.groups import MANY_GROUPS
from mptrain.data.tasks.pooling import pooled, pooling_of
from mptrain.data.tasks.retrieval import retrieval
from mptrain.models.load import load_model
from mptrain.models.samples import guess_task
from mptrain.recipe import Data, Model

WORDS = "good bad fine poor great awful film plot cast".split()


def loaded(folder, rows, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(Data(train=str(file), max_length=12, **data), "embedding", tiny.tokenizer(), seed=1)


def pairs(n=40):
    return [{"text": f"good {w} {i}", "text_pair": f"{w} plot was {i}"} for i, w in zip(range(n), WORDS * n)]


def hidden(data, batch):
    """A made-up last hidden state: every token at a place of its own."""
    draw = torch.Generator().manual_seed(3)
    table = torch.randn(len(data.processor), 8, generator=draw)
    return {"last_hidden_state": table[batch["input_ids"]]}


# -- pooling


def test_every_pooling_reads_the_tokens_that_count():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 4, generator=draw)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # the second padded on the left
    for row, kept in enumerate(mask.bool()):
        own = states[row][kept]
        places = torch.arange(1, 6)[kept].float()[:, None]
        expected = {
            "mean": own.mean(0),
            "sqrt_len": own.sum(0) / math.sqrt(len(own)),
            "weighted": (own * places).sum(0) / places.sum(),
            "max": own.max(0).values,
            "cls": own[0],
            "last": own[-1],
        }
        for mode, vector in expected.items():
            torch.testing.assert_close(pooled(states, mask, (mode,))[row], normalize(vector, dim=0))
    both = pooled(states, mask, ("cls", "mean"))
    assert both.shape == (3, 8) and both.norm(dim=1).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("mean", "max")),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("sqrt_len",)),
        ({"pooling_mode": "lasttoken"}, ("last",)),
        (None, ("mean",)),
    ],
)
def test_the_model_says_how_it_is_pooled(config, modes, tmp_path):
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8} | config))
    assert pooling_of(str(tmp_path)) == modes


def test_a_module_or_mode_that_is_unknown_is_refused(tmp_path):
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"sentence_transformers.models.Dense, which is not read here"):
        pooling_of(str(tmp_path))
    (tmp_path / "modules.json").unlink()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}')
    with pytest.raises(ModelError, match=r"has the pooling .*median"):
        pooling_of(str(tmp_path))


# -- scores


def test_retrieval_is_that_of_a_plain_loop():
    draw = np.random.default_rng(0)
    similar, wanted = draw.normal(size=(600, 40)), draw.random((600, 40)) < 0.1
    wanted[np.arange(600), draw.integers(0, 40, 600)] = True
    ndcg, mrr, *recalls = retrieval(600, lambda part: similar[part], lambda part: wanted[part].astype(np.int8))
    assert ndcg.value == pytest.approx(ndcg_score(wanted, similar, k=10))
    firsts = [min(r for r, i in enumerate(np.argsort(-s), 1) if w[i]) for s, w in zip(similar, wanted)]
    assert mrr.value == pytest.approx(np.mean([1 / r for r in firsts]))
    assert [r.value for r in recalls] == pytest.approx([np.mean(np.array(firsts) <= k) for k in (1, 5, 10)])


def test_a_model_that_maps_all_texts_to_one_vector_finds_nothing():
    kinds = np.eye(20, dtype=np.int8)
    ndcg, mrr, *recalls = retrieval(20, lambda part: np.ones((20, 20))[part], lambda part: kinds[part])
    assert (ndcg.value, mrr.value) == (0.0, pytest.approx(1 / 20)) and [r.value for r in recalls] == [0.0] * 3


def test_pairs_are_searched_among_all_second_texts_and_negatives(tmp_path):
    rows = [row | {"negative": f"awful cast {i}"} for i, row in enumerate(pairs())]
    rows[1]["text_pair"] = rows[0]["text_pair"]  # one text in two pairs is one candidate
    data = loaded(tmp_path, rows, text_pair="text_pair", negative="negative")
    scores = data.evaluate(lambda batch: hidden(data, batch), "test", 4)
    texts = data.texts["test"]
    vectors = {}
    for text in chain(*texts.values()):
        tokens = data.processor(text, return_tensors="pt")
        state = hidden(data, tokens)["last_hidden_state"]
        vectors[text] = pooled(state, tokens["attention_mask"])[0].numpy()
    candidates = sorted({*texts["text_pair"], *texts["negative"]})
    wanted = np.array([[c == pair for c in candidates] for pair in texts["text_pair"]])
    similar = np.array([[vectors[text] @ vectors[c] for c in candidates] for text in texts["text"]])
    assert scores[0].n == len(texts["text"])
    # words that are unknown to the tokenizer make ties, and a tie counts as before
    assert scores[0].value == pytest.approx(ndcg_score(wanted, similar - 1e-5 * wanted, k=10), abs=1e-9)


def test_groups_are_searched_among_all_other_texts(tmp_path):
    rows = [{"text": f"{WORDS[i % 9]} film {i}", "label": WORDS[i % 9]} for i in range(120)]
    data = loaded(tmp_path, rows, label="label")
    ndcg, _, first, *_ = data.evaluate(lambda batch: hidden(data, batch), "test")
    names = data._about["test"][:, 0]
    batch = data.collate([data.test[i] for i in range(len(data.test))])
    vectors = pooled(hidden(data, batch)["last_hidden_state"], batch["attention_mask"]).numpy()
    values, hits = [], []
    for i, name in enumerate(names):
        others = [j for j in range(len(names)) if j != i]
        wanted = np.array([[names[j] == name for j in others]])
        similar = np.array([[vectors[i] @ vectors[j] for j in others]])
        if wanted.any():
            similar = similar - 1e-5 * wanted
            values.append(ndcg_score(wanted, similar, k=10))
            hits.append(bool(wanted[0, similar[0].argmax()]))
    assert (ndcg.n, ndcg.value) == (len(values), pytest.approx(np.mean(values), abs=1e-5))
    assert first.value == pytest.approx(np.mean(hits))


def test_scored_pairs_are_scored_by_the_order_of_their_cosines(tmp_path):
    rows = [row | {"score": i % 6} for i, row in enumerate(pairs(60))]
    data = loaded(tmp_path, rows, text_pair="text_pair", score="score")
    spearman, _ = data.evaluate(lambda batch: hidden(data, batch), "test", 3)
    batch = data.collate([data.test[i] for i in range(len(data.test))])
    vectors = pooled(hidden(data, batch)["last_hidden_state"], batch["attention_mask"])
    cosines = cosine_similarity(*vectors.chunk(2))
    assert spearman.value == pytest.approx(spearmanr(cosines, data._about["test"]).statistic, abs=1e-6)
    assert batch["scores"].min() == 0 and batch["scores"].max() == 1, "0..5 become 0..1"


# -- what is learned


def test_the_contrastive_loss_leaves_out_what_belongs_to_a_text_too(tmp_path):
    rows = pairs()
    for i in (1, 2):  # three pairs of one text, and one second text of two
        rows[i]["text"] = rows[0]["text"]
    rows[4]["text_pair"] = rows[3]["text_pair"]
    again = str(tmp_path / "rows.jsonl")  # so that no row leaves the training split
    data = loaded(tmp_path, rows, text_pair="text_pair", validation=again, test=again)
    batch = data.collate([data.train[i] for i in range(7)])
    draw = torch.Generator().manual_seed(0)
    outputs = {"last_hidden_state": torch.randn(14, batch["input_ids"].shape[1], 6, generator=draw)}
    vectors = pooled(outputs["last_hidden_state"], batch["attention_mask"])
    terms = []
    for i in range(7):
        kept = [
            j for j in range(7)
            if j == i or (rows[j]["text"] != rows[i]["text"] and rows[j]["text_pair"] != rows[i]["text_pair"])
        ]  # fmt: skip
        logits = 20 * torch.stack([vectors[i] @ vectors[7 + j] for j in kept])
        terms.append(logits.logsumexp(0) - logits[kept.index(i)])
    assert float(data.loss(outputs, batch)) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_a_member_of_a_group_learns_from_another_one(tmp_path):
    rows = [{"text": f"{WORDS[i % 9]} film {WORDS[i // 9]}", "label": i % 9} for i in range(81)]
    data = loaded(tmp_path, rows, label="label")
    for i in range(len(data.train)):
        own, other = data.train[i]["texts"]
        assert not np.array_equal(own["input_ids"], other["input_ids"])
        assert data.train[i]["labels"][0] == data.train[i]["labels"][1]
    assert len(data.test[0]["texts"]) == 1
    again = loaded(tmp_path, rows, label="label")
    assert all(
        np.array_equal(a["input_ids"], b["input_ids"])
        for i in range(5)
        for a, b in zip(data.train[i]["texts"], again.train[i]["texts"])
    )


def test_many_groups_stay_whole_and_few_are_in_every_split(tmp_path):
    rows = [{"text": f"film {i} plot", "label": f"g{i % MANY_GROUPS}"} for i in range(300)]
    facts = loaded(tmp_path, rows, label="label").facts
    assert facts["groups"]["crossing"] == 0 and sum(facts["groups_by_label"].values()) == MANY_GROUPS
    few = [row | {"label": row["label"][:2]} for row in rows]
    facts = loaded(tmp_path, few, label="label").facts
    assert "groups" not in facts and all(5 <= n <= 10 for n in facts["groups_by_label"].values())


def test_teacher_and_student_may_have_vectors_of_different_sizes(tmp_path):
    data = loaded(tmp_path, pairs(), text_pair="text_pair")
    batch = data.collate([data.train[i] for i in range(4)])
    shape = batch["input_ids"].shape
    draw = torch.Generator().manual_seed(0)
    small, large = ({"last_hidden_state": torch.randn(*shape, n, generator=draw)} for n in (4, 12))
    assert float(data.distillation(small, large, batch, 2.0)) > 0.01
    assert float(data.distillation(large, large, batch, 2.0)) == pytest.approx(0, abs=1e-7)


def test_agreement_is_about_the_order_and_not_the_size_of_similarities():
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(6, 3, 8, generator=draw)
    batch = {"attention_mask": torch.ones(6, 3, dtype=torch.long)}
    same = Embedding.agreement({"last_hidden_state": state}, {"last_hidden_state": (3 * state).numpy()}, batch)
    np.testing.assert_array_equal(same, 1.0)
    other = {"last_hidden_state": torch.randn(6, 3, 8, generator=draw)}
    assert 0.2 < Embedding.agreement({"last_hidden_state": state}, other, batch).mean() < 0.8, "chance is a half"


# -- bad input


@pytest.mark.parametrize(
    ("change", "named", "message"),
    [
        ({"score": float("nan")}, {"text_pair": "text_pair", "score": "score"}, r"data.score: row 5 of .* holds nan"),
        ({"score": "near"}, {"text_pair": "text_pair", "score": "score"}, r"data.score: row 5 of .* number is needed"),
        ({"text_pair": None}, {"text_pair": "text_pair"}, r"data.text_pair: row 5 of .* holds None where text"),
        ({"label": "alone"}, {"label": "label"}, r"data.label: row 5 of .*: the group 'alone' has no other text"),
        ({"label": None}, {"label": "label"}, r"data.label: row 5 of .* holds None where the name of a group"),
        ({}, {}, r"learns from text with text_pair .* the recipe names text\."),
        ({}, {"text_pair": "text_pair", "label": "label"}, r"the recipe names text, label, text_pair"),
    ],
)
def test_bad_rows_are_named(change, named, message, tmp_path):
    rows = [row | {"score": i % 5, "label": f"g{i % 3}"} for i, row in enumerate(pairs())]
    rows[4] |= change
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps(row | {"score": 1, "label": "g1", "text_pair": "x"}) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, rows, validation=str(whole), test=str(whole), **named)


# -- the model


def test_an_encoder_is_loaded_and_saved_without_its_pooler(tmp_path):
    """It would be a second output of every export, and train for nothing."""
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    for cls in (BertModel, BertForSequenceClassification):
        cls(config).save_pretrained(tmp_path / cls.__name__)
        model = load_model(Model(path=str(tmp_path / cls.__name__), task="embedding"), None, seed=0)
        assert type(model) is BertModel and model.pooler is None
        ids = torch.randint(50, (2, 7))
        found = model(input_ids=ids)
        assert list(found) == ["last_hidden_state"]
        torch.testing.assert_close(found[0], BertModel.from_pretrained(tmp_path / cls.__name__)(input_ids=ids)[0])
        mptrain.save(model, tmp_path / f"{cls.__name__}-saved")
        again = mptrain.load(tmp_path / f"{cls.__name__}-saved")
        assert again.pooler is None and torch.equal(again(input_ids=ids)[0], found[0])


def test_an_encoder_without_a_head_is_for_embeddings():
    """It was exported with a head of two classes, at random."""
    assert guess_task(BertConfig(architectures=["BertModel"])) == "embedding"
    assert guess_task(BertConfig(architectures=["BertLMHeadModel"])) == "causal-lm"
