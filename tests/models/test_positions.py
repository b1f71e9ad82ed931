"""The most tokens that a model says it reads is what it reads: one more fails inside it."""

import pytest
import torch
import transformers as t

from mptrain.models.positions import positions_of, token_rows

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
OF = {**SIZES, "max_position_embeddings": 66}
MODELS = {
    "bert": (t.BertForSequenceClassification, t.BertConfig(**OF), 66),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig(**OF), 64),
    "xlm-roberta": (t.XLMRobertaForSequenceClassification, t.XLMRobertaConfig(**OF), 64),
    "mpnet": (t.MPNetForSequenceClassification, t.MPNetConfig(**OF), 64),
    "esm": (t.EsmForSequenceClassification, t.EsmConfig(**OF, pad_token_id=1, mask_token_id=4), 64),
    "deberta": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config(**OF), 66),
    "electra": (t.ElectraForSequenceClassification, t.ElectraConfig(**OF, embedding_size=16), 66),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=66), 66),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
            word_embed_proj_dim=32,
            max_position_embeddings=66,
        ),
        66,
    ),
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**OF, num_key_value_heads=2), None),
}


@pytest.mark.parametrize("family", MODELS)
def test_one_token_more_fails_inside_the_model(family):
    cls, config, limit = MODELS[family]
    model = cls(config).eval()
    with torch.device("meta"):
        found = positions_of(cls(config))
    assert (found.tokens if found else None) == limit
    assert token_rows(model) == 50
    if limit is None:
        return

    def run(length):
        ids = torch.randint(5, 50, (1, length))
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids))

    assert run(limit).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        run(limit + 1)


def test_patches_of_a_picture_and_frames_of_a_sound_are_no_tokens():
    """Their tables are shorter than that of the texts: CLIP-B/32 has 50 patches and reads 77 tokens."""
    side = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**side, "vocab_size": 50, "max_position_embeddings": 16}
    picture = {**side, "image_size": 8, "patch_size": 4}
    whisper = t.WhisperConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, max_source_positions=10, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        for model in (
            t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=picture)),
            t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=picture)),
            t.WhisperForConditionalGeneration(whisper),
        ):
            found = positions_of(model)
            assert found is not None and found.tokens == 16, type(model).__name__
