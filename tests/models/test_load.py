"""Models and processors: strict, repeatable, quiet, offline, and never running code unasked."""

import json
import logging
import pickle
import shutil
import socket
import textwrap

import pytest
import torch
import transformers
from kit.structures import keep
from kit.tiny import SPECIAL, WORDS, save_bert, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import ModelError
from mptrain.models import artifact
from mptrain.models.head import fit_head, head_class
from mptrain.models.load import load_model, set_dropout
from mptrain.models.processor import load_processor
from mptrain.recipe import TASKS, Model

LABELS = ["fresh", "rotten"]
TASK = "text-classification"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(5, 17)[None]


def spec(path, task=TASK, **fields):
    return Model(path=str(path), task=task, **fields)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A fine-tuned classifier with the classes fresh and rotten."""
    folder = tmp_path_factory.mktemp("bert")
    return save_bert(folder, id2label={0: "fresh", 1: "rotten"}, label2id={"fresh": 0, "rotten": 1})


@pytest.fixture(scope="module")
def encoder(bert, tmp_path_factory):
    """The same without head."""
    folder = tmp_path_factory.mktemp("encoder")
    BertForSequenceClassification.from_pretrained(bert).bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


# -- loading


def test_a_trained_model_is_loaded_as_it_is(bert):
    model = load_model(spec(bert), LABELS, seed=1)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), logits(BertForSequenceClassification.from_pretrained(bert).eval()))
    eager = load_model(spec(bert, attn="eager"), LABELS, seed=1)
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(model))


def test_half_weights_become_float32(bert, tmp_path):
    BertForSequenceClassification.from_pretrained(bert, dtype=torch.float16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(spec(tmp_path), LABELS, seed=1).parameters()} == {torch.float32}


def test_a_new_head_comes_from_the_seed_alone(encoder):
    labels = ["a", "b", "c"]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load_model(spec(encoder), labels, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is untouched"
    torch.manual_seed(99)
    second, third = load_model(spec(encoder), labels, seed=5), load_model(spec(encoder), labels, seed=6)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, third.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, third.bert.embeddings.word_embeddings.weight)
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert first.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert (first.num_labels, first.config.num_labels, first.classifier.out_features) == (3, 3, 3)
    assert 0.005 < first.classifier.weight.std() < 0.05, "drawn by the model's own rule"
    assert first.classifier.bias.abs().max() == 0
    assert first(input_ids=IDS, labels=torch.tensor([2])).loss.isfinite()


def test_it_is_quiet_and_puts_the_settings_back(encoder, capfd, caplog):
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()
    try:
        with caplog.at_level(logging.DEBUG):
            load_model(spec(encoder), LABELS, seed=0)
            load_processor(spec(encoder))
        assert transformers.utils.logging.get_verbosity() == logging.WARNING
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_local_paths_never_touch_the_network(bert, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load_model(spec(bert), LABELS, seed=0)
    load_processor(spec(bert))


def test_saving_keeps_plain_weight_names(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
           for n, w in weights.items()}  # fmt: skip
    assert any("gamma" in name for name in old)
    save_file(old, copy / "model.safetensors", {"format": "pt"})
    model = load_model(spec(copy), LABELS, seed=0)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()


# -- folders that mptrain.save wrote


def same(found, expected):
    """But for the last bits: some CPUs' matrix products depend on where in memory the weights lie, and in which row."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def pruned(bert, tmp_path_factory):
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1], 1: [0, 3]}, {0: list(range(8)), 1: list(range(40))}))
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    artifact.save(model, folder, tokenizer())
    return folder, logits(model)


def test_a_pruned_model_keeps_its_structure(pruned):
    folder, expected = pruned
    model = load_model(spec(folder), LABELS, seed=0)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 8
    for loaded in (model, load_model(spec(folder, dropout=0.0), LABELS, seed=0, new_head=False)):
        (file,) = folder.glob("*.safetensors")
        stored = load_file(file)
        assert stored and all(torch.equal(loaded.state_dict()[name], value) for name, value in stored.items())
        same(logits(loaded), expected)
    eager = load_model(spec(folder, attn="eager"), LABELS, seed=0)
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), expected)
    assert load_processor(spec(folder))("good")["input_ids"] == tokenizer()("good")["input_ids"]


def test_a_pruned_model_is_bound_to_its_classes_and_dropout(pruned):
    folder, _ = pruned
    with pytest.raises(ModelError, match=r"\['fresh', 'rotten'\] apart, in this order, and the data has \['a', 'b'\]"):
        load_model(spec(folder), ["a", "b"], seed=0)
    with pytest.raises(ModelError, match=r"model.dropout"):
        load_model(spec(folder, dropout=0.0), LABELS, seed=0)


def test_a_dense_model_that_was_saved_is_a_plain_folder(bert, tmp_path):
    artifact.save(BertForSequenceClassification.from_pretrained(bert), tmp_path / "dense", tokenizer())
    model = load_model(spec(tmp_path / "dense", dropout=0.0), ["rotten", "fresh"], seed=0)
    same(logits(model), logits(load_model(spec(bert), LABELS, seed=0))[:, [1, 0]])


# -- heads


def test_classes_in_another_order_are_put_in_the_order_of_the_data(bert):
    straight, turned = (load_model(spec(bert), labels, seed=0) for labels in (LABELS, ["Rotten", "Fresh"]))
    assert torch.equal(turned.classifier.weight, straight.classifier.weight[[1, 0]])
    same(logits(turned), logits(straight)[:, [1, 0]])
    assert turned.config.id2label == {0: "Rotten", 1: "Fresh"}


@pytest.mark.parametrize("labels", [["0", "1"], ["negative", "positive"]])
def test_other_names_for_as_many_classes_are_taken_by_position(bert, labels, caplog):
    model = load_model(spec(bert), labels, seed=0)
    assert torch.equal(logits(model), logits(load_model(spec(bert), LABELS, seed=0)))
    assert ("by position" in caplog.text) == (labels[0] == "negative")


def test_a_head_for_another_number_of_classes_is_replaced(bert):
    labels = ["a", "b", "c", "d"]
    models = [load_model(spec(bert), labels, seed=seed) for seed in (1, 1, 2)]
    assert logits(models[0]).shape == (1, 4)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not torch.equal(logits(models[0]), logits(models[2]))
    assert torch.equal(models[0].bert.pooler.dense.weight, models[2].bert.pooler.dense.weight)


def test_a_teacher_must_know_the_classes(bert, encoder):
    assert load_model(spec(bert), LABELS, seed=0, new_head=False).config.id2label == {0: "fresh", 1: "rotten"}
    with pytest.raises(ModelError, match=r"lacks 2 of the weights .*trained for its task"):
        load_model(spec(encoder), LABELS, seed=0, new_head=False)
    for labels in (["a", "b", "c"], ["good", "bad"]):
        with pytest.raises(ModelError, match=r"\['fresh', 'rotten'\] apart"):
            load_model(spec(bert), labels, seed=0, new_head=False)


def test_every_kind_of_classifier_gets_as_many_outputs_as_there_are_labels(tmp_path):
    configs = {
        "text-classification": RobertaConfig(**SIZES, vocab_size=30),
        "token-classification": BertConfig(**SIZES, vocab_size=30),
        "image-classification": SwinConfig(embed_dim=16, depths=[1], num_heads=[2], window_size=4, image_size=16),
        "audio-classification": Wav2Vec2Config(
            **SIZES, conv_dim=(16,), conv_kernel=(8,), conv_stride=(4,), num_feat_extract_layers=1,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=2,
        ),
    }  # fmt: skip
    for task, config in configs.items():
        head_class(TASKS[task]).from_config(config).base_model.save_pretrained(tmp_path / task)
        tokenizer().save_pretrained(tmp_path / task)
        model = load_model(spec(tmp_path / task, task), ["x", "y", "z"], seed=0)
        last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert (last.out_features, model.config.num_labels) == (3, 3), task


def test_tasks_without_labels(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path / "llama")
    model = load_model(spec(tmp_path / "llama", "causal-lm"), None, seed=0)
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()))
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path / "mlm")
    reader = load_model(spec(tmp_path / "mlm", "question-answering"), None, seed=0)
    assert reader(input_ids=IDS).start_logits.shape == IDS.shape


def test_a_masked_language_model_may_lack_a_pooler(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path)
    one, two = (load_model(spec(tmp_path), LABELS, seed=3) for _ in range(2))
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


def test_a_model_without_output_layer_is_an_error():
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=30))
    model.classifier = torch.nn.Identity()
    with pytest.raises(ModelError, match="no linear output layer"):
        fit_head(model, LABELS, (), new_head=True)


def test_decoders_classify_at_the_last_token_that_is_not_padding(tmp_path):
    LlamaForSequenceClassification(
        LlamaConfig(**SIZES, vocab_size=len(SPECIAL) + len(WORDS), pad_token_id=None)
    ).model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load_model(spec(tmp_path), LABELS, seed=0)
    assert model.config.pad_token_id == tokenizer().pad_token_id
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    mask = (ids != 0).long()
    with torch.no_grad():
        both, alone = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids[:1, :3]).logits
    torch.testing.assert_close(both[:1], alone)


# -- dropout


def test_dropout_is_set_everywhere_before_the_model_is_built(bert):
    model = load_model(spec(bert, dropout=0.0), LABELS, seed=0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    model.train()
    assert torch.equal(logits(model), logits(model.eval()))
    assert {m.p for m in load_model(spec(bert), LABELS, seed=0).modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_dropout_of_nested_configs_and_other_spellings():
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_dropout_prob=0.2), transformers.GPT2Config(resid_pdrop=0.3)
    )
    set_dropout(config, 0.05)
    assert config.encoder.hidden_dropout_prob == config.encoder.attention_probs_dropout_prob == 0.05
    assert config.decoder.resid_pdrop == config.decoder.attn_pdrop == config.decoder.embd_pdrop == 0.05
    bert = BertConfig()
    set_dropout(bert, 0.05)
    assert bert.classifier_dropout is None, "None follows hidden_dropout_prob"


# -- what is refused


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(copy, tmp_path, name):
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelError, match=rf"pickled weights \({name}\).*save_pretrained"):
        load_model(spec(copy), LABELS, seed=0)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_beside_safetensors_are_not_read(copy, tmp_path):
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    load_model(spec(copy), LABELS, seed=0)
    assert not (tmp_path / "ran").exists()
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")  # harmless, and still not opened
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(spec(copy), LABELS, seed=0)


def test_a_checkpoint_without_a_part_of_the_encoder_is_an_error(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*layer.1.attention.self.query.weight.*random"):
        load_model(spec(copy), LABELS, seed=0)


def test_weights_of_other_shapes_are_an_error(copy):
    edit_config(copy, intermediate_size=100)
    with pytest.raises(ModelError, match=r"other shapes than its config.json says"):
        load_model(spec(copy), LABELS, seed=0)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x01" * 30), "the model of .* could not be loaded"),
        (lambda f: edit_config(f, model_type="no-such"), "the model of .* could not be loaded"),
    ],
)
def test_a_broken_folder_is_one_paragraph(copy, break_it, said):
    break_it(copy)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(spec(copy), LABELS, seed=0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.path: ")


def test_a_task_the_architecture_has_no_head_for(tmp_path):
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.task: .* no question-answering head .*\(ViTConfig\)"):
        load_model(spec(tmp_path, "question-answering"), None, seed=0)


def test_a_path_that_is_not_there_names_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"{tmp_path / 'a/b/c'} is not a folder, and 'a/b/c' is neither a hub name"):
        load_model(spec("a/b/c"), LABELS, seed=0)
    for load in (lambda s: load_model(s, LABELS, seed=0), load_processor):
        with pytest.raises(ModelError, match=rf"no folder {tmp_path / 'owner/none'}.*check the name and the network"):
            load(spec("owner/none"))


def test_a_folder_without_tokenizer(encoder, tmp_path):
    shutil.copy(encoder / "config.json", tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_processor(spec(tmp_path))


# -- code

MODELING = textwrap.dedent("""
    from pathlib import Path
    from transformers import BertForSequenceClassification
    Path({mark!r}).touch()
    class Doubled(BertForSequenceClassification):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 2
            return output
""")


def test_a_modeling_file_runs_only_when_allowed(bert, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "doubled.py"
    file.write_text(MODELING.format(mark=str(mark)))
    asked = spec(bert, modeling=str(file))
    for load in (lambda: load_model(asked, LABELS, seed=0), lambda: load_processor(asked)):
        with pytest.raises(ModelError, match=r"a recipe alone never runs code.*--allow-code"):
            load()
    assert not mark.exists()
    model = load_model(asked, LABELS, seed=0, allow_code=True)
    assert mark.exists()
    assert type(model).__name__ == "Doubled"
    torch.testing.assert_close(logits(model), 2 * logits(load_model(spec(bert), LABELS, seed=0)))


def test_modeling_files_that_do_not_fit(bert, tmp_path):
    file = tmp_path / "model.py"
    for text, said in (
        ("x = 1", "defines 0 model classes"),
        (
            MODELING.format(mark=str(tmp_path / "m")) + "class Other(Doubled): pass",
            r"2 model classes \(Doubled, Other\)",
        ),
        ("raise ValueError('no')", "failed: ValueError: no"),
    ):
        file.write_text(text)
        with pytest.raises(ModelError, match=said):
            load_model(spec(bert, modeling=str(file)), LABELS, seed=0, allow_code=True)
    with pytest.raises(ModelError, match=f"no file {tmp_path / 'none.py'}"):
        load_model(spec(bert, modeling=str(tmp_path / "none.py")), LABELS, seed=0, allow_code=True)


def test_remote_code_runs_only_when_recipe_and_command_line_say_so(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "doubled.py").write_text(MODELING.format(mark=str(tmp_path / "ran")))
    edit_config(copy, auto_map={"AutoModelForSequenceClassification": "doubled.Doubled"})
    with pytest.raises(ModelError, match=r"model.trust_remote_code.*--allow-code"):
        load_model(spec(copy, trust_remote_code=True), LABELS, seed=0)
    assert type(load_model(spec(copy), LABELS, seed=0, allow_code=True)) is BertForSequenceClassification
    assert not (tmp_path / "ran").exists()
    model = load_model(spec(copy, trust_remote_code=True), LABELS, seed=0, allow_code=True)
    assert type(model).__name__ == "Doubled"


# -- processors


def test_tokenizers(bert, tmp_path):
    found = load_processor(spec(bert))
    assert found.is_fast
    assert found("good film")["input_ids"] == tokenizer()("good film")["input_ids"]
    padless = tokenizer()
    padless.pad_token, padless.eos_token = None, "[SEP]"
    shutil.copy(bert / "config.json", tmp_path)
    padless.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_processor(spec(tmp_path)).pad_token == "[SEP]"


def test_inputs_that_the_model_does_not_take_are_not_made(tmp_path, bert):
    tokenizer().save_pretrained(tmp_path)
    DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=48).save_pretrained(tmp_path)
    assert tokenizer()("good").keys() == load_processor(spec(bert))("good").keys() == {
        "input_ids", "token_type_ids", "attention_mask"
    }  # fmt: skip
    assert load_processor(spec(tmp_path))("good").keys() == {"input_ids", "attention_mask"}


def test_words_that_are_already_split_suit_byte_level_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import RobertaTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {p: i for i, p in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    Tokenizer(models.BPE(vocab, [])).save(str(tmp_path / "t.json"))
    RobertaTokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path)
    RobertaConfig(**SIZES, vocab_size=len(vocab)).save_pretrained(tmp_path)
    found = load_processor(spec(tmp_path, "token-classification"))
    encoding = found([["ab", "c"]], is_split_into_words=True)
    assert [w for w in encoding.word_ids(0) if w is not None] == [0, 0, 0, 1, 1]


def test_image_and_audio_processors(tmp_path):
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path / "v")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "v")
    found = load_processor(spec(tmp_path / "v", "image-classification"))
    assert isinstance(found, ViTImageProcessorPil)
    assert (found.size["height"], found.size["width"]) == (16, 16)
    (tmp_path / "v" / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ModelError, match="'NoSuchProcessor' has no Pillow variant"):
        load_processor(spec(tmp_path / "v", "image-classification"))
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "a")
    Wav2Vec2Config(**SIZES).save_pretrained(tmp_path / "a")
    assert load_processor(spec(tmp_path / "a", "audio-classification")).sampling_rate == 8000


def test_attention_that_the_architecture_lacks(tmp_path):
    swin = SwinConfig(embed_dim=16, depths=[1], num_heads=[2], window_size=4, image_size=16, num_labels=2)
    SwinForImageClassification(swin).save_pretrained(tmp_path / "s")
    pixels = torch.randn(1, 3, 16, 16)
    found = load_model(spec(tmp_path / "s", "image-classification"), ["0", "1"], seed=0)
    expected = SwinForImageClassification.from_pretrained(tmp_path / "s").eval()
    with torch.no_grad():
        assert torch.equal(found(pixels).logits, expected(pixels).logits)
    assert found.config._attn_implementation == "eager", "Swin has no sdpa; nobody asked for it"
    with pytest.raises(ModelError, match=r"model.attn: .* has no sdpa attention .*set model.attn: eager"):
        load_model(spec(tmp_path / "s", "image-classification", attn="sdpa"), ["0", "1"], seed=0)
