"""A configuration of NNCF 2 becomes a recipe that says the same, or is refused with what to do instead."""

from __future__ import annotations

import json

import pytest
import yaml
from kit import tiny
from transformers import BertForSequenceClassification

from mptrain.cli import main
from mptrain.core.errors import UserError
from mptrain.flow import from_nncf
from mptrain.recipe import file

JPQD = r"""
// JPQD of a BERT; comments and trailing commas are allowed
{
  "input_info": [{"sample_size": [16, 384], "type": "long"}],
  "compression": [
    {
      "algorithm": "movement_sparsity", /* "in words" */
      "params": {
        "warmup_start_epoch": 1, "warmup_end_epoch": 4, "importance_regularization_factor": 0.02,
        "enable_structured_masking": true,
      },
      "sparse_structure_by_scopes": [
        {"mode": "block", "sparse_factors": [16, 16], "target_scopes": "{re}.*BertAttention.*"},
        {"mode": "per_dim", "axis": 0, "target_scopes": "{re}.*BertIntermediate.*"},
        {"mode": "per_dim", "axis": 1, "target_scopes": "{re}.*BertOutput.*"},
      ],
      "ignored_scopes": ["{re}.*NNCFEmbedding", "{re}.*classifier.*", "{re}BertLayer\\[0\\]/BertAttention"],
    },
    {
      "algorithm": "quantization",
      "preset": "mixed",
      "initializer": {"range": {"num_init_samples": 32, "type": "percentile"}},
      "ignored_scopes": ["{re}.*__add___[0-1]", "{re}.*layer_norm_0", "{re}/NNCFLinear\\[query\\]/linear_0"],
    },
  ],
  "log_dir": "logs // not a comment",
}
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bert"
    tiny.save_bert(folder)
    return folder


def stage(config, bert, **options):
    return from_nncf.convert(config, model=str(bert), **options).recipe["stages"][0]


@pytest.mark.parametrize(("fix", "reduced"), [("enable", True), ("disable", None), ("first_layer_only", None)])
def test_the_fix_of_overflows_is_a_reduced_range(bert, fix, reduced):
    found = stage({"algorithm": "quantization", "overflow_fix": fix}, bert, epochs=1.0)
    assert found["quantize"].get("reduce_range") == reduced


def test_jpqd_becomes_a_recipe_that_runs_dry(bert, tmp_path, capsys):
    (tmp_path / "nncf.json").write_text(JPQD)
    tiny.save_reviews(tmp_path / "reviews.csv")
    recipe = tmp_path / "recipe.yaml"
    command = ["convert-config", str(tmp_path / "nncf.json"), "--model", str(bert), "--to", str(recipe)]
    assert main([*command, "--epochs", "5", "--data", str(tmp_path / "reviews.csv")]) == 0
    assert "mptrain recipe" in capsys.readouterr().out
    found = yaml.safe_load(recipe.read_text())
    attention = "bert.encoder.layer.0.attention."
    assert found["stages"] == [
        {
            "id": "compressed",
            "from": "model",
            "prune": {
                "method": "movement",
                "regularization": 0.02,
                "schedule": {"start": 1, "end": 4, "unit": "epoch"},
                "attention_block": [16, 16],
                "ignore": [
                    attention + "output.dense",
                    *(attention + f"self.{name}" for name in ("key", "query", "value")),
                ],
            },
            "quantize": {
                "mode": "qat",
                "weights": "symmetric",
                "activations": "asymmetric",
                "ignore": [r"re:^bert\.encoder\.layer\.\d+\.attention\.self\.query$"],
            },
            "train": {"epochs": 5.0, "lr": 2e-5},
        }
    ]
    assert found["data"]["max_length"] == 384 and found["data"]["calibration"] == {"samples": 32}
    notes = [line for line in recipe.read_text().splitlines() if line.startswith("# - ")]
    assert any("__add___" in note for note in notes) and any("output.dir" in note for note in notes)
    assert any("quantize.start: joint" in note for note in notes)
    assert not any("layer_norm_0" in note for note in notes), "it names modules, which are not quantized anyway"
    short = ["--set", "data.max_length=16", "--set", "evaluate.latency.length=[16]"]  # what the model can read
    assert main(["recipe", str(recipe), *short, "--dry-run"]) == 0
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_patterns_of_all_layers_match_them_and_no_others(bert):
    from mptrain.compress.structure.scopes import resolve

    scopes = from_nncf.Scopes(BertForSequenceClassification.from_pretrained(bert))
    hits, idle = scopes.matched(["{re}BertOutput.*NNCFLinear", "{re}nothing"])
    assert len(hits) == 2 and idle == ["{re}nothing"]
    (pattern,) = scopes.patterns(hits)
    assert resolve([pattern], scopes.leaves, "ignore") == hits
    (one,) = scopes.patterns({"bert.encoder.layer.1.output.dense"})
    assert one == "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: {"compression": one}])
def test_one_algorithm_a_list_and_a_whole_configuration_are_read(bert, wrap):
    found = stage(wrap({"algorithm": "quantization", "weights": {"mode": "asymmetric", "bits": 4}}), bert)
    assert found["quantize"]["weights"] == "asymmetric" and found["quantize"]["bits"] == {"re:.": 4}
    assert found["quantize"]["activations"] == "symmetric" and found["train"]["epochs"] == 3


def test_embeddings_that_are_ignored_stay_fp32(bert):
    config = {"algorithm": "quantization", "ignored_scopes": ["{re}NNCFEmbedding\\[word_embeddings\\]"]}
    assert stage(config, bert)["quantize"]["embeddings"] == "fp32"


def test_distillation_keeps_the_balance_of_the_losses(bert):
    config = [{"algorithm": "quantization"}, {"algorithm": "knowledge_distillation", "scale": 3, "temperature": 4}]
    found = stage(config, bert)
    assert found["teacher"] == "self" and found["distill"] == {"weight": 0.75, "temperature": 4.0}
    found = stage({"algorithm": "quantization"}, bert, teacher="packaged:minilm-l6", distill=(0.9, 2.0))
    assert found["teacher"] == "packaged:minilm-l6" and found["distill"] == {"weight": 0.9, "temperature": 2.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"algorithm": "magnitude_sparsity"}, "prune: {method: magnitude"),
        ({"algorithm": "filter_pruning"}, "attention heads and FFN channels"),
        ({"algorithm": "anything"}, "anything: is not an algorithm"),
        ({"algorithm": "quantization", "activations": {"bits": 4}}, r"activations\.bits: 4"),
        (
            {"algorithm": "movement_sparsity", "params": {"enable_structured_masking": False}},
            "whole heads and channels",
        ),
        ({"algorithm": "movement_sparsity", "params": {"warmup_end_epoch": 2}}, "importance_regularization_factor"),
        ({"algorithm": "quantization", "ignored_scopes": ["{re}("]}, "is not a regular expression"),
        ({"bits": 8}, "not a configuration of NNCF 2"),
        ([], "not a configuration of NNCF 2"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(bert, config, said):
    with pytest.raises(UserError, match=said):
        from_nncf.convert(config, model=str(bert))


def test_all_that_is_refused_is_said_at_once(bert):
    config = [{"algorithm": "rb_sparsity"}, {"algorithm": "binarization"}]
    with pytest.raises(UserError, match=r"(?s)rb_sparsity.*binarization"):
        from_nncf.convert(config, model=str(bert))


def test_nothing_is_dropped_without_a_note(bert):
    config = {"algorithm": "quantization", "quantize_outputs": True, "initializer": {"precision": {"type": "hawq"}}}
    found = from_nncf.convert({"compression": config, "unknown": 1}, model=str(bert))
    assert [n.split(":")[0] for n in found.notes[1:]] == [
        "quantization.initializer.precision",
        "quantization.quantize_outputs",
        "unknown",
    ]
    assert file.validate(found.recipe, "x")


@pytest.mark.parametrize("text", ['{"a": }', "", "[1, 2"])
def test_what_is_no_json_is_said(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: is not JSON"):
        from_nncf.read(tmp_path / "x.json")


def test_comments_end_where_strings_begin(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "// \\" , }", /* , */ "b": [1, 2,], } // end')
    assert from_nncf.read(tmp_path / "x.json") == {"a": '// " , }', "b": [1, 2]}
    assert json.loads(json.dumps(from_nncf.read(tmp_path / "x.json")))
