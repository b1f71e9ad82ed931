"""Each check that is made before training refuses in a run and in a dry run, with the same message."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from kit import tiny, tiny_tasks
from kit.jobs import run
from transformers import BertModel, MambaConfig, MambaForCausalLM

from mptrain.core import host
from mptrain.core.errors import ModelError, UserError
from mptrain.flow import preflight
from mptrain.recipe import Recipe

LM_EVAL = Path(__file__).resolve().parents[1] / "kit" / "lm_eval"


def refused(folder, described, message, *options, status=2):
    """By both, in the same words, and nothing is begun."""
    recipe = tiny.write(described, folder / "recipe.yaml")
    said = []
    for way in ((), ("--dry-run",)):
        lines = run(recipe, *options, *way, check=status).stderr.splitlines()
        said.append(next(line for line in reversed(lines) if line.startswith("mptrain: error: ")))
    assert message in said[0] and said[0] == said[1]
    assert not (folder / "run" / "stages").exists()


SET = [
    ("stages.jpqd.quantize.ignore=[encodr.layer.0]", "stages.jpqd.quantize.ignore: 'encodr.layer.0' matches no module"),
    ("stages.jpqd.quantize.bits={nowhere: 4}", "stages.jpqd.quantize.bits: 'nowhere' matches no module"),
    ("stages.jpqd.prune.ignore=[nothing.here]", "stages.jpqd.prune.ignore: 'nothing.here' matches no module"),
    ("stages.jpqd.prune.keep.encoder_params=0.001", "stages.jpqd.prune.keep.encoder_params: 0.001 cannot be reached"),
    ("stages.jpqd.prune.schedule.end=0.01", "stages.jpqd.prune.schedule: the warm-up from 0 to 0.01 epochs"),
    ("evaluate.latency.length=[1024]", "evaluate.latency.length: 1024"),
    ("data.train=typo.csv", "data.train: there is no file"),
    ("data.max_length=65", "data.max_length: 65 is more than the 64 tokens this model can read"),
    ("model.path=runs/no/model", "model.path: "),
    ("export.ov.precision=[compressed]", "export.ov.precision: "),
]


@pytest.mark.parametrize(("change", "message"), SET, ids=[change.partition("=")[0] for change, _ in SET])
def test_a_value(tmp_path, change, message):
    refused(tmp_path, tiny.jpqd(tmp_path), message, "--set", change)


def test_an_export_longer_than_the_model_reads(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["export"] = [{"id": "ml", "format": "coreml", "of": ["dense"]}]  # 1 to 128 tokens by default
    refused(tmp_path, described, "export.ml.shapes.length: 128 is more than the 64 tokens that the model reads (")


STAGES = [
    (
        {"quantize": {"mode": "weight_only", "method": "rtn", "block_size": 24}},
        "stages.small.quantize: bert.encoder.layer.0.attention.self.query.weight: ",
    ),
    (
        {"quantize": {"mode": "weight_only", "method": "rtn", "overrides": {"nowhere": {"bits": 8}}}},
        "stages.small.quantize.overrides: 'nowhere' matches no module",
    ),
    (
        {"palettize": {"method": "kmeans", "ignore": ["re:.*(query|key|value|dense)"], "embeddings": False}},
        "stages.small.palettize: ",
    ),
    ({"palettize": {"method": "kmeans", "ignore": ["nowhere"]}}, "stages.small.palettize.ignore: 'nowhere' matches no"),
    (
        {"prune": {"method": "curvature", "keep": {"macs": 1e-6}}},
        "stages.small.prune.keep.macs: 1e-06 cannot be reached",
    ),
]


@pytest.mark.parametrize(("stage", "message"), STAGES, ids=["block", "override", "partial", "ignore", "budget"])
def test_a_method_that_cannot_be_meant_for_the_model(tmp_path, stage, message):
    described = tiny.jpqd(tmp_path)
    described["stages"][1] = {"id": "small", **stage}
    described["export"][0] |= {"of": ["dense", "small"], "precision": ["fp32", "compressed"]}
    refused(tmp_path, described, message)


def test_an_untrained_head(tmp_path):
    described = tiny.jpqd(tmp_path)
    base = BertModel.from_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "bert")
    described["stages"] = [{"id": "ptq", "quantize": {"mode": "ptq"}}]
    described["export"][0]["of"] = ["model", "ptq"]
    refused(tmp_path, described, "model, ptq, which are exported. Give a fine-tuned model")


def test_an_export_that_cannot_read_the_longest_input(tmp_path):
    described = tiny.jpqd(tmp_path)
    core_ml = {"id": "ml", "format": "coreml", "of": ["dense"], "shapes": {"length": [1, 2]}}
    described["export"].append(core_ml)
    refused(tmp_path, described, "export.ml.shapes.length: 2 is less than the longest input")


def test_weights_that_a_target_cannot_hold(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["stages"][1] = {"id": "q", "quantize": {"mode": "weight_only", "method": "rtn", "block_size": 16}}
    core_ml = {"id": "ml", "format": "coreml", "of": ["q"], "minimum_deployment_target": "iOS17"}
    described["export"] = [core_ml, described["export"][0] | {"of": ["dense"]}]
    refused(tmp_path, described, "stages.q.quantize.bits: export.ml cannot hold it")


def core_ml(folder):
    described = tiny.jpqd(folder)
    described["export"] = [{"id": "ml", "format": "coreml", "of": ["dense"], "precision": ["fp32"]}]
    return described


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    message = "coremltools is not installed. Install it with: pip install 'mptrain[coreml]'"
    refused(tmp_path, core_ml(tmp_path), message, status=1)


def test_a_version_that_nobody_tried(tmp_path, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda of: "8.3" if of == "coremltools" else version(of))
    refused(tmp_path, core_ml(tmp_path), "export to Core ML is made for coremltools ==9.0, 8.3 is installed")


def generating(folder, cache=64):
    """A causal language model with its questions, exported with a cache."""
    shutil.copytree(LM_EVAL, folder / "lm_eval")
    described = tiny_tasks.recipe("causal-lm", folder)
    described["stages"] = [{"id": "dense", "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}}]
    described["export"] = [{"id": "ml", "format": "coreml", "of": ["dense"], "precision": ["fp32"], "cache": cache}]
    described["evaluate"]["multiple_choice"] = [str(folder / "lm_eval" / "moods.yaml")]
    return described


def test_a_cache_beyond_the_model(tmp_path):
    refused(tmp_path, generating(tmp_path, 65), "export.ml.cache: 65 must be 1 to 64, the model's limit; lower it")


def test_a_cache_of_a_model_that_keeps_other_things(tmp_path):
    described = generating(tmp_path)
    folder = Path(described["model"]["path"])
    config = MambaConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(folder)
    message = "export.ml.cache: an export with a cache: MambaForCausalLM keeps other things than keys and values"
    refused(tmp_path, described, message)


def test_a_file_of_questions_that_cannot_be_read(tmp_path):
    described = generating(tmp_path)
    file = tmp_path / "lm_eval" / "moods.yaml"
    file.write_text(file.read_text() + "unknown_key: 1\n")
    refused(tmp_path, described, "unknown_key")


def test_questions_longer_than_the_cache(tmp_path):
    described = generating(tmp_path, 8)
    described["data"] |= {"max_length": 8, "stride": None}
    refused(tmp_path, described, "of the longest question of ")


def test_questions_on_the_hub_are_left_to_the_run(tmp_path):
    described = generating(tmp_path)
    file = tmp_path / "lm_eval" / "moods.yaml"
    task = yaml.safe_load(file.read_text()) | {"dataset_path": "nobody/nowhere", "dataset_kwargs": {}}
    file.write_text(yaml.safe_dump(task))
    assert preflight.check(Recipe.model_validate(described), offline=True).questions == []


def test_what_is_checked_is_what_a_run_begins_with(tmp_path):
    recipe = Recipe.model_validate(generating(tmp_path))
    run_, dry = (preflight.check(recipe, offline=offline) for offline in (False, True))
    for found in (run_, dry):
        assert found.architecture.known and found.data is not None and len(found.questions) == 1
        assert {p.device for p in found.architecture.model.parameters()} == {torch.device("meta")}
    assert run_.data.hash == dry.data.hash and run_.questions[0].hash == dry.questions[0].hash


def test_a_dry_run_checks_what_is_here(tmp_path):
    described = tiny.jpqd(tmp_path) | {"planning": {"model_type": "bert", "config": {"num_hidden_layers": 1}}}
    described["model"]["path"] = "nobody/nothing"
    found = preflight.check(Recipe.model_validate(described), offline=True)
    assert not found.architecture.known and found.data is None and found.architecture.config.num_hidden_layers == 1
    described["data"]["train"] = str(tmp_path / "typo.csv")
    with pytest.raises(UserError, match=r"data\.train: there is no file"):
        preflight.check(Recipe.model_validate(described), offline=True)


def test_code_of_ones_own_is_checked_where_it_can_be_built_without_weights(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["stages"][1]["prune"]["ignore"] = ["nothing.here"]
    file = tmp_path / "modeling_own.py"
    described["model"]["modeling"] = str(file)
    begin = "from transformers import BertForSequenceClassification\nclass Own(BertForSequenceClassification):\n"
    file.write_text(begin + "    pass\n")
    recipe = Recipe.model_validate(described)
    with pytest.raises(UserError, match=r"stages\.jpqd\.prune\.ignore: 'nothing.here' matches no module"):
        preflight.check(recipe, allow_code=True)
    file.write_text(begin + "    def post_init(self):\n        float(next(self.parameters()).sum())\n")
    assert preflight.check(recipe, allow_code=True).architecture.model is None


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    described = tiny.jpqd(tmp_path)
    described["stages"][1]["train"]["report_to"] = ["tensorboard"]
    assert preflight.check(Recipe.model_validate(described)).data is not None
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = "stages.jpqd.train.report_to: tensorboard is not installed: pip install tensorboard, or take it out."
    refused(tmp_path, described, message)


def test_a_tracker_that_nobody_knows(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["stages"][1]["train"]["report_to"] = ["tensorbord"]
    refused(tmp_path, described, "stages.jpqd.train.report_to.0: 'tensorbord' is not known; trackers are tensorboard,")


@pytest.mark.parametrize(
    ("flags", "reduced", "said"), [(["avx2"], False, True), (["avx2"], True, False), (["avx_vnni"], False, False)]
)
def test_int8_that_this_cpu_computes_wrong_is_said(tmp_path, monkeypatch, caplog, flags, reduced, said):
    described = tiny.jpqd(tmp_path)
    described["stages"][1]["quantize"]["reduce_range"] = reduced
    monkeypatch.setattr(host, "_cpu", lambda: ("a CPU", flags))
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    preflight.check_exports(Recipe.model_validate(described))
    assert ("neither VNNI nor AMX" in caplog.text) == said


LOOP = """
import torch
from torch import nn


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.cell, self.out = nn.Embedding(100, 8), nn.GRUCell(8, 8), nn.Linear(8, 1)

    def forward(self, input_ids, attention_mask):
        x, mask = self.table(input_ids), attention_mask.float()
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            kept = mask[:, step, None]
            state = kept * self.cell(x[:, step], state) + (1 - kept) * state
        return self.out(state)
"""


@pytest.mark.parametrize("name", ["openvino", pytest.param("onnx", marks=pytest.mark.long)])
def test_a_loop_that_a_trace_writes_out_is_refused_before_training(tmp_path, name):
    made = tiny_tasks.clicks(tmp_path)
    (tmp_path / "loop.py").write_text(LOOP)
    described = {
        "schema": "mptrain/v1",
        "name": "loop",
        "model": {"path": str(tmp_path / "model"), "module": f"{tmp_path / 'loop.py'}:Loop", "task": "click-rate"},
        "data": made["data"],
        "stages": [{"id": "dense", "train": {"epochs": 1, "lr": 1e-3, "batch_size": 8}}],
        "export": [{"id": "out", "format": name, "of": ["dense"], "precision": ["fp32"]}],
        "evaluate": {"latency": {"length": [16]}},
        "output": {"dir": str(tmp_path / "run")},
    }
    with pytest.raises(ModelError, match=r"export\.out: .*one example alone.*mptrain\.Recurrence"):
        preflight.check(Recipe.model_validate(described), allow_code=True)
