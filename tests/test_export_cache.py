"""A key-value cache as a user asks for it: `cache` in a recipe's export, `mptrain export --cache`, `mptrain verify`."""

from __future__ import annotations

import json

import pytest
import tiny_tasks
import torch
from tiny_models import tiny

import mptrain
from mptrain import recipe_file
from mptrain.cli import main
from mptrain.compress.shrink import shrink
from mptrain.compress.structure import Kept, find_structure
from mptrain.errors import ExportError, RecipeError, UserError
from mptrain.export.coreai import Runner
from mptrain.export.coreai_cache import export_decoder as to_coreai
from mptrain.export.coreml_decoder import export_decoder as to_coreml
from mptrain.export.decoder import texts
from mptrain.run import run
from mptrain.verify import parity
from mptrain.verify.mil import Interpreter
from mptrain.verify.texts import Texts

IDS = torch.randint(4, 50, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 20, dtype=torch.long)
MASK[0, :6] = 0  # padded on the left
MASK[1, 17:] = 0  # and on the right


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


def test_a_recipe_scores_the_cached_exports_as_the_whole_texts(tmp_path):
    tokens = tiny_tasks.recipe("causal-lm", tmp_path)["data"]["max_length"]
    exports = [
        {"id": "ov", "format": "openvino", "of": ["dense", "int4"]},
        {"id": "ml", "format": "coreml", "of": ["int4"], "cache": tokens},
        {"id": "ai", "format": "coreai", "of": ["int4"], "precision": ["fp32"], "cache": tokens + 8},
    ]
    report = run(recipe_file.read(recipe(tmp_path, exports)).recipe)
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
    words = (tmp_path / "run/report.html").read_text()
    assert f"keeps a key-value cache of {tokens + 8} tokens in fp32; texts went in piece by piece" in words


@pytest.mark.parametrize("format_", ["coreml", "coreai"])
def test_the_command_writes_runs_and_compares(format_, tmp_path, capsys):
    folder, facts = tmp_path / "model", tmp_path / "facts.json"
    mptrain.save(tiny("llama"), folder)
    words = ["export", folder, "--to", tmp_path / "out", "--format", format_, "--cache", 40, "--max-length", 30]
    status = main([*map(str, words), "--samples", "4", "--json", str(facts)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    found = json.loads(facts.read_text())
    assert found["runtime"]["cache"] == 40 and found["passed"]
    assert found["judged_by"] == ("agreement" if format_ == "coreml" else "parity")
    if format_ == "coreml":
        package = tmp_path / "out/model.mlpackage"
        assert main(["verify", str(package), "--model", str(folder), "--json", str(facts)]) == 0, (
            capsys.readouterr().err
        )
        checked = json.loads(facts.read_text())
        assert set(checked["states"]) == {"key_0", "value_0", "key_1", "value_1"}
        assert 0 < checked["parity"]["max_abs_diff"] < 1e-2


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("format_", ["coreml", "coreai"])
def test_pruned_heads_have_a_smaller_cache(format_, family, tmp_path):
    """Layers differ in their heads; rows are padded on either side."""
    model = tiny(family)
    shrink(model, find_structure(model), Kept({0: [1]}, {1: [0, 2, 5]}))
    if format_ == "coreml":
        runner = Interpreter(to_coreml(model, tmp_path / "out", max_length=20).package, "fp32")
        shapes = {name: list(result.shape) for name, result in runner.program.states.items()}
    else:
        runner = Runner(to_coreai(model, tmp_path / "out", max_length=20).asset)
        shapes = runner.states
    heads = find_structure(tiny(family)).attention[0].kv_heads
    assert (shapes["key_0"], shapes["key_1"]) == ([1, 1, 20, 8], [1, heads, 20, 8])
    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = parity.compare(model, Texts(runner, tokens=1 if format_ == "coreai" else 20, max_length=20), [batch])
    assert found["max_abs_diff"] < 1e-5 and found["argmax_agreement"] == 1.0


def test_texts_are_what_the_mask_leaves():
    found = texts({"input_ids": IDS, "attention_mask": MASK})
    assert [t.shape for t in found] == [(1, 14), (1, 17), (1, 20)]
    assert torch.equal(found[0][0], IDS[0, 6:]) and torch.equal(found[1][0], IDS[1, :17])


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
            r"sets its own shapes \(batch 1\) and the route export; drop shapes and route",
        ),
        (CORE_ML | {"cache": 4}, {}, "4 tokens are fewer than data.max_length, .* raise it"),
        (CORE_ML | {"cache": 0}, {}, "greater than 0"),
        (CORE_AI | {"precision": ["fp16"]}, {}, r"give precision: \[fp32\], got \['fp16'\]"),
        (CORE_AI, {"task": "text-classification"}, "is for task causal-lm, not for text-classification; drop it"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(export, model, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        recipe_file.read(recipe(tmp_path, [export], **model))


def test_the_command_refuses_a_model_without_a_cache(tmp_path, capsys):
    mptrain.save(tiny("bert"), tmp_path / "bert")
    words = ["export", tmp_path / "bert", "--to", tmp_path / "out", "--format", "coreml", "--cache", 16]
    assert main([*map(str, words), "--samples", "2"]) == 2
    assert "needs a plain float32 causal LM, got BertForSequenceClassification" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words[words.index("coreml")] = "openvino"
    assert main(list(map(str, words))) == 2
    assert "cache" in capsys.readouterr().err


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
            agreement[exported.folder.name] = parity.compare(model, runner, [batch])["argmax_agreement"]
        except ExportError:
            agreement[exported.folder.name] = 0.0  # not finite
    assert plain.half is None and agreement["plain"] < 0.5 and agreement["searched"] > 0.95
    assert done.half["kept_fp32"] and done.half["all_half"]["error"] > 0.1 > 0.01 > done.half["executed"]["error"]
