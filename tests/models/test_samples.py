"""Inputs made up for a model that no data are given for."""

from __future__ import annotations

import pytest
from kit import tiny
from transformers import AutoModelForImageClassification as Pictures
from transformers import AutoModelForSequenceClassification as Texts
from transformers import (
    BartConfig,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    ResNetConfig,
    ViTImageProcessor,
    XLNetConfig,
)

from mptrain.core.errors import UserError
from mptrain.core.signature import probed
from mptrain.export.torch.cached_decoder import check_length
from mptrain.models.samples import load_with_inputs, made_up
from mptrain.recipe import TASKS


def resnet():
    return Pictures.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (ViTImageProcessor(size={"height": 40, "width": 48}), (40, 48)),
        (CLIPImageProcessor(size={"shortest_edge": 50}, crop_size={"height": 36, "width": 44}), (36, 44)),
        (CLIPImageProcessor(size={"shortest_edge": 50}, do_center_crop=False), (50, 50)),
        (ConvNextImageProcessor(size={"shortest_edge": 52}), (52, 52)),
        (None, (224, 224)),
    ],
)
def test_pictures_have_the_size_that_the_processor_makes(processor, size):
    batch = made_up(resnet(), TASKS["image-classification"], 2, processor=processor).batches[0]
    assert tuple(batch["pixel_values"].shape) == (2, 3, *size)


def test_a_bound_of_positions_below_one_is_none(tmp_path):
    """XLNet says max_position_embeddings -1."""
    config = XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)
    assert config.max_position_embeddings == -1
    Texts.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("good film\nbad plot\n" * 4)
    found = load_with_inputs(str(tmp_path), None, None, str(tmp_path / "texts.txt"), 4, 16, False)
    assert found.samples.batches[0]["input_ids"].shape[0] == 4
    check_length("--cache", 64, config)
    with pytest.raises(UserError, match="must be 1 to"):
        check_length("--cache", 0, config)


def test_made_up_texts_end_with_the_end_token():
    """BART's and T5's classifiers read it, and refuse texts without."""
    config = BartConfig(
        **{"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    )
    model = Texts.from_config(config).eval()
    batch = made_up(model, TASKS["text-classification"], 8, 20).batches[0]
    ends, lengths = batch["input_ids"] == config.eos_token_id, batch["attention_mask"].sum(1)
    assert ends.sum(1).tolist() == [1] * 8 and ends.int().argmax(1).equal(lengths - 1)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == config.pad_token_id).all()
    assert probed(model, batch).lengths() == ["tokens"], "a text that is cut for the probe keeps its end"
