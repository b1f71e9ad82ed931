"""A vocabulary that is cut in the middle of a run: later stages, exports and the teacher read the same texts."""

from __future__ import annotations

import json

import pytest
import torch
from kit import tiny
from kit.jobs import run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import mptrain


@pytest.fixture
def described(tmp_path):
    """A BERT with pieces of words of which the reviews use some."""
    words = [*tiny.WORDS, *(f"{w}ly" for w in tiny.WORDS)]
    letters = sorted({c for w in words for c in w})
    pieces = [
        *tiny.SPECIAL,
        *letters,
        *(f"##{c}" for c in letters),
        *dict.fromkeys(w for w in words if len(w) > 1),
        "##ly",
        "##ing",
    ]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), tiny.SPECIAL))
    names["model_input_names"] = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names).save_pretrained(tmp_path / "bert")
    tiny.save_reviews(tmp_path / "reviews.csv")
    found = tiny.jpqd(tmp_path)
    found["stages"].insert(1, {"id": "fewer", "vocabulary": {"keep": "used"}})
    found["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "fewer", "jpqd"], "precision": ["fp32", "int8"]}
    ]
    return found


@pytest.mark.long
def test_what_comes_after_reads_the_texts_anew(described, tmp_path):
    recipe = tiny.write(described, tmp_path / "recipe.yaml")
    run(recipe)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    facts = report["methods"]["fewer"]["facts"]["vocabulary"]
    assert facts["kept"] < facts["of"] and facts["changed"] == 0.0
    assert any(f"{facts['kept']:,} of {facts['of']:,} tokens stay" in note for note in report["notes"])
    found = {v["id"]: v for v in report["variants"]}
    for name, score in found["baseline_fp32"]["metrics"].items():
        assert found["fewer_fp32"]["metrics"][name]["value"] == pytest.approx(score["value"], abs=1e-5)
    assert found["fewer_fp32"]["params"] == found["baseline_fp32"]["params"] - 32 * (facts["of"] - facts["kept"])
    folder = (tmp_path / "run" / found["jpqd_int8"]["path"]).parent
    assert len(AutoTokenizer.from_pretrained(folder)) == facts["kept"]
    model = mptrain.load(tmp_path / "run" / report["checkpoints"]["jpqd"])
    assert model.get_input_embeddings().num_embeddings == facts["kept"]


@pytest.mark.long
def test_an_embedding_of_low_rank_is_trained_and_exported(described, tmp_path):
    described["stages"][1]["vocabulary"]["rank"] = 16
    described["stages"][2]["quantize"] |= {"embeddings": "int4"}
    formats: dict[str, list[str]] = {"openvino": ["fp32", "int8_emb4"], "onnx": ["fp32", "int8"], "coreai": ["fp32"]}
    formats |= {"coreml": ["fp32", "fp16"]}
    described["export"] = [
        {"id": f, "format": f, "of": ["fewer", "jpqd"], "precision": found} for f, found in formats.items()
    ]
    described["export"][-1]["shapes"] = {"length": [8, 32]}
    described["stages"][2]["quantize"]["reduce_range"] = True
    run(tiny.write(described, tmp_path / "recipe.yaml"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    facts = report["methods"]["fewer"]["facts"]["vocabulary"]
    assert facts["rank"] == 16 and 0.5 < facts["explained"] < 1
    assert any("a product of rank 16, which held" in note for note in report["notes"])
    model = mptrain.load(tmp_path / "run" / report["checkpoints"]["jpqd"])
    assert model.get_input_embeddings().table.weight.shape == (facts["kept"], 16)


def test_it_is_refused_for_what_has_nothing_to_cut(tmp_path):
    found = tiny.jpqd(tmp_path)
    found["stages"].insert(1, {"id": "fewer", "vocabulary": {"keep": "used"}})
    recipe = tiny.write(found, tmp_path / "recipe.yaml")
    for more in ((), ("--dry-run",)):
        said = run(recipe, *more, check=2).stderr
        assert "stages.fewer.vocabulary: the tokenizer is a WordLevel" in " ".join(said.split())
