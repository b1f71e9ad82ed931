"""A key-value cache as a user asks for it: `cache` in a recipe's export, `mptrain export --cache`, `mptrain verify`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from kit import tiny_tasks
from kit.long import except_for
from kit.structures import keep
from kit.tiny_models import tiny

import mptrain
from mptrain.cli import main
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import DataError, ExportError, RecipeError, UserError
from mptrain.data.lm_eval.questions import MultipleChoice
from mptrain.export.coreai.cached import export_decoder as to_coreai
from mptrain.export.coreai.runner import Asset
from mptrain.export.coreml.cached import export_decoder as to_coreml
from mptrain.export.torch.cached_decoder import CachedDecoder, padded_right, texts
from mptrain.export.torch.texts import Texts
from mptrain.flow.preflight import read_questions
from mptrain.mil.interpreter import Interpreter
from mptrain.models.load import load_model, read_config
from mptrain.models.processor import load_processor
from mptrain.recipe import EXPORTS, file
from mptrain.run import run
from mptrain.verify import parity

IDS = torch.randint(4, 50, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 20, dtype=torch.long)
MASK[0, :6] = 0  # padded on the left
MASK[1, 17:] = 0  # and on the right


class TorchRunner:
    def __init__(self, step):
        self.step = step

    def reset(self):
        """Position 0 is enough."""

    @torch.no_grad()
    def __call__(self, batch):
        return {"logits": self.step(batch["input_ids"], batch["position"])[0].numpy()}


def windowed(config, **options):
    """Weights large enough that attention matters."""
    size = {"vocab_size": 50, "hidden_size": 32, "max_position_embeddings": 40, "initializer_range": 0.3}
    heads = {"num_heads": 4, "num_layers": 2} if config is transformers.GPTNeoConfig else {}
    heads = heads or {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    made = config(**size, **heads, intermediate_size=48, pad_token_id=0, **options)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


def recipe(folder, exports, **model):
    made = tiny_tasks.recipe("causal-lm", folder)
    made["model"] |= model
    made["stages"] = [
        {"id": "dense", "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}},
        {"id": "int4", "quantize": {"mode": "weight_only", "block_size": 16}},
    ]
    made["export"] = exports
    made["gates"] = {"parity": 1e-4, "fused_attention": None}
    (folder / "recipe.yaml").write_text(json.dumps(made))
    return folder / "recipe.yaml"


@pytest.mark.long
def test_a_recipe_scores_the_cached_exports_as_the_whole_texts(tmp_path):
    tokens = tiny_tasks.recipe("causal-lm", tmp_path)["data"]["max_length"]
    exports = [
        {"id": "ov", "format": "openvino", "of": ["dense", "int4"]},
        {"id": "ml", "format": "coreml", "of": ["int4"], "cache": tokens},
        {"id": "ai", "format": "coreai", "of": ["int4"], "precision": ["fp32"], "cache": tokens + 8},
    ]
    report = run(file.read(recipe(tmp_path, exports)).recipe)
    rows = {(v["format"], v["precision"]): v for v in report["variants"] if v["stage"] == "int4"}
    assert set(rows) == {("openvino", "compressed"), ("coreml", "fp32"), ("coreml", "fp16"), ("coreai", "fp32")}
    whole = rows["openvino", "compressed"]["metrics"]["perplexity"]["value"]
    for (format_, precision), row in rows.items():
        near = 1e-5 if format_ != "coreml" else 1e-3
        assert row["metrics"]["perplexity"]["value"] == pytest.approx(whole, rel=near), (format_, precision)
    exact, half = rows["coreml", "fp32"], rows["coreml", "fp16"]
    assert exact["parity"]["max_abs_diff"] > 1e-6, "its states are float16"
    assert rows["coreai", "fp32"]["parity"]["max_abs_diff"] < 1e-5
    assert {"int4", "int8"} <= set(exact["runtime"]["weight_types"])
    assert (exact["runtime"]["cache"], exact["runtime"]["cache_precision"]) == (tokens, "fp16")
    assert half["runtime"]["half"]["executed"]["finite"] and half["runtime"]["half"]["said"].startswith("0 ops in FP32")
    judged = {gate["name"]: gate for gate in report["gates"]}
    assert judged["parity"]["variant"] != exact["id"] and judged["parity"]["passed"] and judged["agreement"]["passed"]
    pages = [(tmp_path / "run" / name).read_text() for name in ("report.html", "report.md")]
    for kept in (
        f"{tokens + 8} tokens in fp32; texts went in piece by piece.",
        "piece by piece, and agreement judges it",
    ):
        assert all(kept in page for page in pages)


@pytest.mark.parametrize(
    ("format_", "family", "precision"),
    [
        ("openvino", "llama", "fp32"),
        ("openvino", "opt", "int4"),
        ("coreml", "llama", "fp32"),
        pytest.param("coreml", "opt", "fp16", marks=pytest.mark.long),
        ("coreai", "opt", "fp32"),
    ],
)
def test_the_command_writes_runs_and_compares(format_, family, precision, tmp_path, capsys):
    folder, facts = tmp_path / "model", tmp_path / "facts.json"
    mptrain.save(tiny(family), folder)
    words = ["export", folder, "--to", tmp_path / "out", "--format", format_, "--precision", precision, "--cache", 40]
    status = main([*map(str, words), "--samples", "4", "--json", str(facts)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    found = json.loads(facts.read_text())
    assert "A key-value cache of 40 tokens in fp" in shown.out and f"judged by {found['judged_by']}" in shown.out
    assert found["runtime"]["cache"] == 40 and found["passed"]
    assert found["judged_by"] == ("parity" if format_ != "coreml" and precision == "fp32" else "agreement")
    configs = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert all(config["use_cache"] is True for config in configs)
    if format_ == "coreml":
        package = tmp_path / "out/model.mlpackage"
        assert main(["verify", str(package), "--model", str(folder), "--json", str(facts)]) == 0, (
            capsys.readouterr().err
        )
        checked = json.loads(facts.read_text())
        assert [run["shapes"]["input_ids"] for run in checked["runs"]] == [[1, 16], [1, 16], [1, 8]], (
            "the cache is read"
        )
        assert set(checked["states"]) == {"key_0", "value_0", "key_1", "value_1"}
        assert 0 < checked["parity"]["max_abs_diff"] < 1e-2


@pytest.mark.parametrize("family", except_for(["opt", "llama"], ["llama"]))
@pytest.mark.parametrize("format_", ["coreml", "coreai"])
def test_pruned_heads_have_a_smaller_cache(format_, family, tmp_path):
    """Layers differ in their heads; rows are padded on either side."""
    model = tiny(family)
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1]}, {1: [0, 2, 5]}))
    if format_ == "coreml":
        runner = Interpreter(to_coreml(model, tmp_path / "out", max_length=20).package, "fp32")
        shapes = {name: list(result.shape) for name, result in runner.program.states.items()}
    else:
        runner = Asset(to_coreai(model, tmp_path / "out", max_length=20).asset)
        shapes = runner.states
    heads = find_structure(tiny(family)).of_kind("heads")[0].units
    assert (shapes["key_0"], shapes["key_1"]) == ([1, 1, 20, 8], [1, heads, 20, 8])
    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = parity.compare(model, Texts(runner, tokens=1 if format_ == "coreai" else 20, max_length=20), [batch])
    assert found["max_abs_diff"] < 1e-5 and found["agreement"] == 1.0


def test_texts_are_what_the_mask_leaves():
    found = texts({"input_ids": IDS, "attention_mask": MASK})
    assert [t.shape for t in found] == [(1, 14), (1, 17), (1, 20)]
    assert torch.equal(found[0][0], IDS[0, 6:]) and torch.equal(found[1][0], IDS[1, :17])


def test_a_row_without_a_token_gives_zeros():
    model = tiny("llama")
    runner = TorchRunner(CachedDecoder(model, 20).eval())
    mask = MASK.clone()
    mask[1] = 0
    found = Texts(runner, tokens=20, max_length=20)({"input_ids": IDS, "attention_mask": mask})["logits"]
    assert found.shape == (3, 20, 50) and not found[1].any() and found[2].any(-1).all()
    with pytest.raises(UserError, match="without a token"):
        Texts(runner, tokens=20, max_length=20)({"input_ids": IDS, "attention_mask": 0 * MASK})


def test_what_does_not_fit_in_the_cache_is_an_error():
    with pytest.raises(UserError, match="a text of 20 tokens does not fit the export's cache of 16: raise `cache`"):
        Texts(None, tokens=1, max_length=16)({"input_ids": IDS})


CORE_ML = {"id": "ml", "format": "coreml", "of": ["dense"], "cache": 64}
CORE_AI = {"id": "ai", "format": "coreai", "of": ["dense"], "cache": 64, "precision": ["fp32"]}


@pytest.mark.parametrize(
    ("export", "model", "message"),
    [
        (
            CORE_ML | {"minimum_deployment_target": "iOS17"},
            {},
            "iOS17 has no states; give minimum_deployment_target: iOS18",
        ),
        (
            CORE_ML | {"route": "trace"},
            {},
            r"sets its own shapes \(batch 1\) and the route export; drop route: trace",
        ),
        (CORE_ML | {"shapes": {"length": [1, 64]}}, {}, r"drop shapes: .*'length': \[1, 64\]"),
        (CORE_ML | {"cache": 4}, {}, "4 tokens are fewer than data.max_length, .* raise it"),
        (CORE_ML | {"cache": 0}, {}, "greater than 0"),
        (CORE_AI | {"precision": ["fp16"]}, {}, r"give precision: \[fp32\], got \['fp16'\]"),
        (CORE_AI, {"task": "text-classification"}, "is for task causal-lm, not for text-classification; drop it"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(export, model, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        file.read(recipe(tmp_path, [export], **model))


def test_a_cache_beyond_the_model_is_said_by_the_dry_run_and_before_training(tmp_path, capsys):
    path = recipe(tmp_path, [CORE_ML | {"cache": 65}])
    message = "export.ml.cache: 65 must be 1 to 64, the model's limit; lower it"
    assert main(["recipe", str(path), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        run(file.read(path).recipe)
    assert not list((tmp_path / "run").glob("stages/*"))


def test_the_dry_run_shows_the_cache_and_its_size(tmp_path, capsys):
    assert main(["recipe", str(recipe(tmp_path, [CORE_ML, CORE_AI])), "--dry-run"]) == 0
    shown, config = capsys.readouterr().out, transformers.AutoConfig.from_pretrained(tmp_path / "model")
    values = 2 * 64 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for name, kind, size in (("ml", "float16", 2), ("ai", "float32", 4)):
        expected = f"{name}: keeps a key-value cache of 64 tokens, {kind} states of {values * size / 1e6:.3g} MB"
        assert expected in " ".join(shown.split())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", ["--format", "coreml", "--cache", 16], "--cache 16: is for task causal-lm, not for text-classific"),
        ("llama", ["--format", "coreml", "--cache", 41], "--cache 41 must be 1 to 40, the model's limit; lower it"),
        ("llama", ["--format", "coreml", "--cache", 0], "cache: Input should be greater than 0"),
        ("llama", ["--format", "coreml", "--cache", 9, "--target", "iOS17"], "coreml fp32: cache: iOS17 has no states"),
        ("llama", ["--format", "coreai", "--cache", 9, "--precision", "fp16"], "give precision: [fp32], got ['fp16']"),
    ],
)
def test_the_command_refuses_before_it_writes(family, options, message, tmp_path, capsys):
    mptrain.save(tiny(family), tmp_path / "model")
    words = ["export", tmp_path / "model", "--to", tmp_path / "out", *options]
    assert main([*map(str, words), "--samples", "2"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_format_without_a_cache_is_refused_with_those_that_have_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EXPORTS["onnx"], "caches", None)
    mptrain.save(tiny("llama"), tmp_path / "model")
    words = ["export", tmp_path / "model", "--to", tmp_path / "out", "--format", "onnx", "--cache", 16]
    assert main([*map(str, words), "--samples", "2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--cache 16: ONNX is written without a cache; drop it, or choose --format openvino or coreml" in said


def test_texts_of_a_recipe_that_are_too_long_are_refused(tmp_path, capsys):
    path = recipe(tmp_path, [CORE_AI])
    words = ["export", tmp_path / "model", "--to", tmp_path / "out", "--format", "coreai", "--cache", 9, "--data", path]
    assert main(list(map(str, words))) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--cache 9: the data of" in said and "has texts of 24 tokens; raise it, or give shorter texts" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_counts_positions_from_the_padding_is_compared_on_its_texts(tmp_path, capsys):
    """GPT-2 gives a text padded on the left other logits than the text, which is what an app feeds."""
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    mptrain.save(transformers.GPT2LMHeadModel(config), tmp_path / "model")
    words = ["export", tmp_path / "model", "--to", tmp_path / "out", "--format", "coreai", "--cache", 20]
    status = main([*map(str, words), "--samples", "4", "--json", str(tmp_path / "facts.json")])
    assert status == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "facts.json").read_text())["parity"]["max_abs_diff"] < 1e-5
    moved = padded_right({"input_ids": IDS, "attention_mask": MASK})
    assert (
        torch.equal(moved["input_ids"][0, :14], IDS[0, 6:])
        and moved["attention_mask"][0].tolist() == [1] * 14 + [0] * 6
    )
    assert torch.equal(moved["input_ids"][1:], IDS[1:])


@pytest.mark.parametrize("format_", [pytest.param("coreml", marks=pytest.mark.long), "coreai"])
def test_layers_that_attend_to_a_window_keep_the_whole_text(format_, tmp_path):
    model = windowed(transformers.MistralConfig, sliding_window=6)
    everything = copy.deepcopy(model)
    everything.config.sliding_window = None
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - everything(input_ids=IDS).logits).abs().max() > 0.1, "the window counts"
    if format_ == "coreml":
        runner = Interpreter(to_coreml(model, tmp_path / "out", max_length=20).package, "fp32")
    else:
        runner = Asset(to_coreai(model, tmp_path / "out", max_length=20).asset)
    texts_of = Texts(runner, tokens=1 if format_ == "coreai" else 20, max_length=20)
    found = parity.compare(model, texts_of, [{"input_ids": IDS, "attention_mask": MASK}])
    assert found["max_abs_diff"] < 1e-4 and found["agreement"] == 1.0


def test_a_model_that_is_wrong_with_such_a_cache_is_refused(tmp_path):
    """GPT-Neo takes its masks from the number of keys, which here is that of all places."""
    model = windowed(transformers.GPTNeoConfig, attention_types=[[["global", "local"], 1]], window_size=8)
    for to in (to_coreml, to_coreai):
        with pytest.raises(UserError, match="GPTNeoForCausalLM gives other logits with a cache of a fixed length"):
            to(model, tmp_path / "out", max_length=20)


def rewritten(path, made):
    path.write_text(json.dumps(made))
    return path


def test_questions_longer_than_the_cache_are_said_before_training(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "kit" / "lm_eval", tmp_path / "lm_eval")
    path = recipe(tmp_path, [CORE_ML | {"cache": 24}, CORE_AI])
    made = json.loads(path.read_text())
    made["evaluate"]["multiple_choice"] = [str(tmp_path / "lm_eval" / "moods.yaml")]
    read = file.read(rewritten(path, made)).recipe
    tokenizer = load_processor(read.model)
    (task,) = read_questions(read, read_config(read.model), tokenizer)
    made["data"]["max_length"], made["data"]["stride"] = task.longest - 1, None
    made["export"][0]["cache"] = task.longest - 1
    read = file.read(rewritten(path, made)).recipe
    with pytest.raises(
        DataError, match=rf"export\.ml\.cache: {task.longest - 1} is less than the {task.longest} tokens"
    ):
        read_questions(read, read_config(read.model), tokenizer)


@pytest.mark.long
def test_multiple_choice_reads_a_cached_package_as_the_model(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "kit" / "lm_eval", tmp_path / "lm_eval")
    read = file.read(recipe(tmp_path, [CORE_ML])).recipe
    model = load_model(read.model, None, seed=0).eval()
    task = MultipleChoice(str(tmp_path / "lm_eval" / "moods.yaml"), load_processor(read.model), 64)
    runner = Interpreter(to_coreml(model, tmp_path / "out", max_length=task.longest).package, "fp32")
    found = task.log_likelihoods(Texts(runner, tokens=task.longest, max_length=task.longest))
    expected = task.log_likelihoods(lambda batch: model(**batch))
    assert max(abs(a - b).max() for a, b in zip(found, expected)) < 1e-4


@pytest.mark.long
def test_the_search_keeps_a_cached_package_right_in_fp16(tmp_path):
    """Squares of the embeddings overflow in the first norm, and from then on in all."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000 / model.model.embed_tokens.weight.abs().max())
    batch = {"input_ids": IDS, "attention_mask": MASK}
    how = {"max_length": 20, "precision": "fp16"}
    plain = to_coreml(model, tmp_path / "plain", **how)
    done = to_coreml(model, tmp_path / "searched", **how, calibration=[batch])
    agreement = {}
    for exported in (plain, done):
        runner = Texts(Interpreter(exported.package), tokens=20, max_length=20)
        try:
            agreement[exported.folder.name] = parity.compare(model, runner, [batch])["agreement"]
        except ExportError:
            agreement[exported.folder.name] = 0.0  # not finite
    assert plain.half is None and agreement["plain"] < 0.5 and agreement["searched"] > 0.95
    assert done.half["kept_fp32"] and done.half["all_half"]["error"] > 0.1 > 0.01 > done.half["executed"]["error"]
