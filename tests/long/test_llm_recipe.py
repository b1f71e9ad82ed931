"""The recipe int4-llm on the real SmolLM2-135M, and on a tiny model what its generation step keeps."""

import json

import pytest
from kit import tiny_tasks
from kit.jobs import run

from mptrain.core.disk import read_json


def written(folder):
    return {v["id"]: v["generation"] for v in read_json(folder / "report.json")["variants"]}


@pytest.mark.long
def test_the_tiny_preset_writes_as_torch_in_float32_and_as_fast_in_int4(tmp_path):
    run("int4-llm", "--set", "preset=tiny", "--set", f"output.dir={tmp_path / 'run'}")
    found = written(tmp_path / "run")
    assert found["baseline_ov_fp32"]["same_as_torch"] == found["baseline_ov_fp32"]["tokens"] == 16
    assert all(of["perplexity"]["relative"] < 1e-3 for of in found.values())
    dense, small = found["baseline_ov_fp32"], found["gptq_ov_compressed"]
    assert small["peak_bytes"] < dense["peak_bytes"] / 2
    assert small["token_ms"]["median"] < 1.2 * dense["token_ms"]["median"]
    assert "4-bit numbers in blocks of 32" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.long
def test_variants_with_a_cache_write_and_others_do_not(tmp_path):
    described = tiny_tasks.recipe("causal-lm", tmp_path)
    described["stages"] = [{"id": "dense", "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}}]
    export = {"format": "openvino", "of": ["dense"], "precision": ["fp32"]}
    described["export"] = [{"id": "ov", **export}, {"id": "kept", **export, "cache": 32}]
    described["evaluate"]["generation"] = {"prompt": 4, "tokens": 8, "texts": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(described))
    run(path)
    found = written(tmp_path / "run")
    (kept,) = (of for name, of in found.items() if "kept" in name)
    assert kept["same_as_torch"] == kept["tokens"] == 8 and kept["prompt"] == 4
    assert kept["perplexity"]["relative"] < 1e-3 and kept["token_ms"]["median"] > 0
    assert [of for name, of in found.items() if "kept" not in name] == [None]
    assert {"generate", "generation"} <= read_json(tmp_path / "run" / "report.json")["wall_s"].keys()
    run(path)  # of a run that is finished nothing is done again
    assert written(tmp_path / "run") == found
