"""Sliding-window perplexity against a token-by-token reference, on torch models and their OpenVINO exports."""

import math

import numpy as np
import pytest
import torch
from kit import report_sample as sample
from kit.tiny import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mptrain.data.load import load_data
from mptrain.data.tasks.metrics import EXP_RATIO, Score
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.recipe import Data
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=32, init_std=0.5)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=32, max_position_embeddings=32, initializer_range=0.5)
    ),
}
LENGTH = 12
WORDS = "good bad fine poor great awful film plot cast the".split()


def stream(tmp_path, **fields):
    draw = np.random.default_rng(3)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(draw.choice(WORDS, draw.integers(2, 9))) for _ in range(12)))
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    data = load_data(
        Data(train=str(file), validation=str(file), test=str(file), max_length=LENGTH, **fields),
        "causal-lm",
        words,
        seed=0,
    )
    return data, words(file.read_text())["input_ids"]


def reference(model, ids, stride):
    """nll of every token but the first, each from a call on the tokens before it alone, no padding and no labels."""
    found = []
    for place in range(1, len(ids)):
        start = next(k for k in range(0, len(ids), stride) if place < k + LENGTH)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:place]])).logits[0, -1].double()
        found.append(-float(logits.log_softmax(0)[ids[place]]))
    return np.array(found)


@pytest.mark.parametrize("stride", [1, 5, None, LENGTH - 1])
@pytest.mark.parametrize("family", MODELS)
def test_perplexity_is_that_of_one_token_at_a_time(family, stride, tmp_path):
    model = MODELS[family]().eval()
    data, ids = stream(tmp_path, stride=stride)
    expected = reference(model, ids, stride or LENGTH // 2)
    loss, perplexity = data.evaluate(lambda batch: model(**batch), "test", 7)
    assert loss.stats[:, 1].sum() == len(ids) - 1
    assert loss.stats[:, 0].sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert perplexity.value == pytest.approx(math.exp(expected.mean()), rel=1e-6)


def test_strides_differ_where_context_matters(tmp_path):
    model = MODELS["llama"]().eval()
    found = [stream(tmp_path, stride=s)[0].evaluate(lambda b: model(**b), "test")[0].value for s in (1, LENGTH - 1)]
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_the_openvino_export_scores_the_same(family, tmp_path):
    model = MODELS[family]().eval()
    data, ids = stream(tmp_path, stride=5)
    done = export_openvino(model, data.example(2, 8), tmp_path / "ir", precision="fp32")
    _, perplexity = data.evaluate(CompiledIr(done.xml, 1), "test", 7)
    assert perplexity.value == pytest.approx(math.exp(reference(model, ids, 5).mean()), rel=1e-4)


def test_the_report_states_window_and_stride(tmp_path):
    data, _ = stream(tmp_path, stride=5)
    stats = np.abs(np.random.default_rng(0).normal(20, 1, (30, 2)))
    variants = sample.variants()
    for variant in variants:
        variant.scores = [Score("perplexity", stats, EXP_RATIO, "number", False)]
    recipe = sample.recipe(model={"path": "packaged:opt", "task": "causal-lm"})
    report = sample.report(recipe=recipe, variants=variants, floor=None, data_facts=data.facts)
    assert report["data"]["perplexity"] == {"window": LENGTH, "stride": 5}
    for text in (markdown(report), page(report), card(report)):
        assert "windows of 12 tokens, stride 5; every token but the very first is predicted once" in text
        assert "from at least 7 tokens before it" in text
        assert "Scored on 30 test windows" in text
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_samples": 3})})
    report = sample.report(recipe=recipe, variants=variants, floor=None, data_facts=data.facts)
    assert "stride 5; of the windows drawn, every token" in markdown(report)


@pytest.mark.parametrize(("vocabulary", "length", "size"), [(49_152, 256, 1), (151_936, 1024, 1), (32_000, 16, 32)])
def test_a_batch_to_score_holds_as_many_windows_as_64_mb_of_logits(vocabulary, length, size, tmp_path):
    """64 windows of 256 tokens over 49,152 words took 9.7 GB."""

    class Words:
        def __len__(self):
            return vocabulary

    data, _ = stream(tmp_path)
    rows = len(data.test)
    words, data.processor = data.processor, Words()
    data.test.lengths[0] = length
    assert data.batch_size("test") == size
    data.processor = words
    seen = []

    def forward(batch):
        seen.append(len(batch["input_ids"]))
        return {"logits": torch.zeros(*batch["input_ids"].shape, len(words))}

    data.evaluate(forward, "test", 3)
    assert seen == [3] * (rows // 3) + ([rows % 3] if rows % 3 else []), "a size of the recipe counts"
