"""Model, tokenizer, teacher and data that do not fit each other are refused before training, by run and dry run."""

import json
import shutil

import pytest
import torch
import transformers as t
from kit import tiny, tiny_tasks, xlnet
from kit.jobs import run

from mptrain.cli import main
from mptrain.core.errors import DataError, ModelError
from mptrain.data.load import load_data
from mptrain.flow import input_checks
from mptrain.models.load import read_config
from mptrain.models.processor import load_processor
from mptrain.recipe import file as recipe_file

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = len(tiny.SPECIAL) + len(tiny.WORDS)


def described(folder):
    """One stage of training."""
    found = tiny.jpqd(folder)
    found["stages"] = found["stages"][:1]
    found["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
    return found


def save(model, folder, tokenizer=None):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)


def check(described):
    """As run and dry run do, without the rest of them."""
    recipe = recipe_file.validate(described, "test")
    processor = load_processor(recipe.model, True)
    data = load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed)
    input_checks.check(recipe, data, read_config(recipe.model, True), allow_code=True, offline=True)


def test_the_bundled_kind_of_recipe_passes(tmp_path):
    check(tiny.jpqd(tmp_path))


@pytest.mark.parametrize("task", tiny_tasks.CASES)
def test_every_task_passes(task, tmp_path):
    check(tiny_tasks.recipe(task, tmp_path))


# -- sizes


def test_the_tokens_that_a_roberta_reads_are_fewer_than_its_positions(tmp_path):
    recipe = described(tmp_path)
    ours = tiny.tokenizer()
    ours.model_max_length = 10**30
    config = t.RobertaConfig(**SIZES, vocab_size=IDS, max_position_embeddings=66, pad_token_id=1, type_vocab_size=2)
    save(t.RobertaForSequenceClassification(config), tmp_path / "bert", ours)
    recipe["data"]["max_length"] = 64
    check(recipe)
    recipe["data"]["max_length"] = 66
    said = (
        r"data.max_length: 66 is more than the 64 tokens that the model reads \(66 positions, counted from pad_token_id"
    )
    with pytest.raises(DataError, match=said):
        check(recipe)
    recipe_path = tiny.write(recipe, tmp_path / "recipe.yaml")
    assert main(["recipe", str(recipe_path), "--dry-run"]) == 2
    assert "data.max_length: 66 is more than the 64 tokens" in run(recipe_path, check=2).stderr
    assert not (tmp_path / "run" / "stages").exists()


def test_a_tokenizer_with_more_tokens_than_embeddings_is_named(tmp_path):
    recipe = described(tmp_path)
    ours = tiny.tokenizer()
    ours.add_tokens(["<user>", "<bot>"])
    ours.save_pretrained(tmp_path / "bert")
    said = rf"the tokenizer has {IDS + 2} tokens, the model {IDS} embeddings \(first without: '<user>'\)"
    with pytest.raises(ModelError, match=said):
        check(recipe)


# -- padding


def test_an_xlnet_is_taken_on_the_left_and_refused_on_the_right(tmp_path):
    recipe = described(tmp_path)
    for side in ("left", "right"):
        shutil.rmtree(tmp_path / "bert")
        xlnet.save(tmp_path / "bert", side)
        if side == "left":
            check(recipe)
    said = r"pads on the right, .* XLNetForSequenceClassification differ .* by \d+% .*write \"padding_side\": \"left\""
    with pytest.raises(ModelError, match=said):
        check(recipe)


def test_a_bert_with_padding_on_the_left_is_refused(tmp_path, capsys):
    recipe = described(tmp_path)
    file = tmp_path / "bert" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    assert main(["recipe", str(tiny.write(recipe, tmp_path / "recipe.yaml")), "--dry-run"]) == 2
    assert 'On the right they agree: write "padding_side": "right"' in capsys.readouterr().err


def test_a_model_without_a_mask_is_refused(tmp_path):
    recipe = described(tmp_path)
    config = t.FNetConfig(vocab_size=IDS, hidden_size=32, num_hidden_layers=2, intermediate_size=32)
    save(t.FNetForSequenceClassification(config), tmp_path / "bert")
    with pytest.raises(
        ModelError, match=r"takes no account of an attention mask, so a score would depend on the batch"
    ):
        check(recipe)


# -- teachers


def other_order():
    """The same words, in another order."""
    ours = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = ours["model"]["vocab"]
    ours["model"]["vocab"] = dict(zip(words, [*range(5), *reversed(range(5, len(words)))]))
    made = tiny.tokenizer()
    made._tokenizer = made._tokenizer.from_str(json.dumps(ours))
    return made


def taught(folder, tokenizer=None, **config):
    recipe = described(folder)
    sizes = {"vocab_size": IDS, "max_position_embeddings": 64} | config
    torch.manual_seed(1)
    sizes = {"id2label": {0: "fresh", 1: "rotten"}, "label2id": {"fresh": 0, "rotten": 1}} | sizes
    save(t.BertForSequenceClassification(t.BertConfig(**SIZES, **sizes)), folder / "teacher", tokenizer)
    recipe["stages"][0] |= {"teacher": str(folder / "teacher"), "distill": {"weight": 0.9}}
    return recipe


def test_a_teacher_of_the_same_tokenizer_passes(tmp_path):
    check(taught(tmp_path))


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_teacher_whose_tokenizer_gives_other_ids_is_refused(tmp_path, option):
    recipe = tiny.write(taught(tmp_path, other_order()), tmp_path / "recipe.yaml")
    said = run(recipe, *option, check=2).stderr
    assert "stages.dense.teacher: its tokenizer gives other ids than the student's" in said
    assert f"of {IDS} tokens differ" in said
    assert not (tmp_path / "run" / "stages").exists()


def test_a_teacher_that_reads_the_same_words_otherwise_is_refused(tmp_path):
    made = tiny.tokenizer()
    ours = json.loads(made.backend_tokenizer.to_str())
    ours["post_processor"] = None  # no [CLS] and [SEP]
    made._tokenizer = made._tokenizer.from_str(json.dumps(ours))
    with pytest.raises(ModelError, match=r"teacher: its tokenizer gives other ids than the student's for '"):
        check(taught(tmp_path, made))


def test_a_teacher_with_fewer_rows_positions_or_other_classes_is_refused(tmp_path):
    with pytest.raises(ModelError, match=rf"the tokenizer has {IDS} tokens, the teacher's model {IDS - 2} embeddings"):
        check(taught(tmp_path, vocab_size=IDS - 2))
    with pytest.raises(DataError, match=r"max_length: 32 is more than the 16 tokens that the teacher's model reads"):
        check(taught(tmp_path, max_position_embeddings=16))
    with pytest.raises(
        ModelError, match=r"a model that is already trained on the data's classes \['fresh', 'rotten'\]"
    ):
        check(taught(tmp_path, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}))


def test_the_dry_run_lists_the_classes(tmp_path, capsys):
    recipe = tiny.write(described(tmp_path), tmp_path / "recipe.yaml")
    assert main(["recipe", str(recipe), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "train", "validation", "test"] in lines
    counts = {line[0]: sum(map(int, line[1:])) for line in lines if line and line[0] in ("'fresh'", "'rotten'")}
    assert len(counts) == 2 and sum(counts.values()) == 240


def taught_by_copy(folder, task):
    """A recipe of a task whose teacher is a copy of its model, with the data's classes."""
    recipe = tiny_tasks.recipe(task, folder)
    shutil.copytree(folder / "model", folder / "teacher")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    labels = {"image-classification": ["below", "left", "right"], "audio-classification": ["high", "low"]}[task]
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0] |= {"teacher": str(folder / "teacher"), "distill": {"weight": 0.5}}
    recipe["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
    return recipe


CHANGES = [
    (
        "image-classification",
        {"image_mean": [0.1, 0.2, 0.3]},
        r"teacher: its processor makes pixel_values that differ by",
    ),
    ("image-classification", {"size": {"height": 8, "width": 8}}, r"of shape \[1, 3, 8, 8\] where the student's have"),
    ("audio-classification", {"sampling_rate": 16000}, r"it hears 16000 samples a second, the student 8000"),
    ("audio-classification", {"do_normalize": False}, r"teacher: its processor makes input_values that differ by"),
]


@pytest.mark.parametrize(("task", "change", "said"), CHANGES)
def test_a_teacher_that_sees_or_hears_otherwise_is_refused(tmp_path, task, change, said):
    recipe = taught_by_copy(tmp_path, task)
    check(recipe)
    file = tmp_path / "teacher" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        check(recipe)


@pytest.mark.parametrize("mask", [True, False])
def test_a_sound_whose_outputs_change_with_padding_is_a_warning(tmp_path, mask, caplog):
    recipe = tiny_tasks.recipe("audio-classification", tmp_path)
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"return_attention_mask": mask}))
    check(recipe)
    assert ("change with the silence that pads it" in caplog.text) == (not mask)


def test_a_decoder_without_ids_of_its_own_is_given_its_first(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 40}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 40, (3, 6))
    kept = torch.ones(3, 6, dtype=torch.bool)
    kept[0, 4:] = kept[1, 3:] = False
    batch = {"input_ids": ids, "attention_mask": kept.long(), "decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
    assert input_checks.padding_difference(model, batch, kept, ["logits"]) <= input_checks.AGREE
    turned, moved = input_checks._padded_on("left", batch, kept)
    assert moved[0].tolist() == [False, False, True, True, True, True]
    assert torch.equal(turned["decoder_input_ids"], batch["decoder_input_ids"])
    del batch["attention_mask"]
    assert input_checks.padding_difference(model, batch, kept, ["logits"]) > input_checks.AGREE
