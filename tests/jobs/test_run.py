"""The main job on tiny inputs, as a user runs it: report, resume after kill -9 and Ctrl-C, errors."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from kit import tiny
from kit.jobs import command, differences, kill_at, metrics, run

from mptrain.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run that the tests below compare with."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny.write(tiny.jpqd(folder), folder / "tiny.yaml")
    return folder, recipe, run(recipe)


def test_the_report_has_what_the_format_promises(finished):
    folder, _, done = finished
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["schema"] == "mptrain.report/v1"
    ids = ["baseline_fp32", "pruned_fp32", "jpqd_int8", "jpqd_int8_emb4"]
    assert [v["id"] for v in report["variants"]] == ids
    for v in report["variants"]:
        accuracy = v["metrics"]["accuracy"]
        assert accuracy["n"] == 60 and accuracy["ci95"][0] <= accuracy["value"] <= accuracy["ci95"][1]
        files = [folder / "run" / v["path"], (folder / "run" / v["path"]).with_suffix(".bin")]
        assert v["size_bytes"] == sum(f.stat().st_size for f in files)
        assert v["latency_ms"]["b1_s16_t1"]["median"] > 0
    sizes = {v["id"]: v["size_bytes"] for v in report["variants"]}
    params = {v["id"]: v["params"] for v in report["variants"]}
    assert params["pruned_fp32"] < params["baseline_fp32"] and sizes["pruned_fp32"] < sizes["baseline_fp32"]
    assert [c["id"] for c in report["comparisons"]] == ids[1:]
    assert all(c["vs"] == "baseline_fp32" for c in report["comparisons"])
    for layer in report["structure"]["layers"]:
        assert 1 <= len(layer["heads"]) <= layer["heads_total"] and layer["ffn"] <= layer["ffn_total"]
    assert {g["name"] for g in report["gates"]} >= {"parity", "fused_attention"}
    assert all(g["passed"] for g in report["gates"])
    assert report["wall_s"]["total"] > 0 and report["host"]["cpu_flags"] and report["versions"]["torch"]
    assert {"stage", "phase", "step", "loss"} <= set(report["history"][0])
    sparsity = [r["compress/sparsity"] for r in report["history"] if "compress/sparsity" in r]
    assert sparsity and sparsity[-1] == pytest.approx(0.5, abs=0.15)
    for name in ("report.md", "report.html", "README.md"):
        assert (folder / "run" / name).stat().st_size > 1000
    assert "jpqd_int8" in done.stdout
    baseline = report["variants"][0]["metrics"]["accuracy"]["value"]
    assert baseline > 0.75, "the tiny task is learnable"


def test_the_exported_models_load_with_optimum_and_the_torch_model_with_load(finished):
    from optimum.intel import OVModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    import mptrain

    folder = finished[0] / "run"
    for variant in ("baseline_fp32", "jpqd_int8", "jpqd_int8_emb4"):
        path = folder / "export" / variant
        model = OVModelForSequenceClassification.from_pretrained(path)
        classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
        assert classify("good great fine film")[0]["label"] == "fresh"
    trained = folder / "stages" / "jpqd" / "1-finetune" / "model"
    assert mptrain.load(trained).config.id2label == {0: "fresh", 1: "rotten"}
    with pytest.raises(Exception):
        AutoModelForSequenceClassification.from_pretrained(trained)


def test_a_finished_run_prints_its_report_and_a_changed_recipe_is_refused(finished, tmp_path):
    folder, recipe, _ = finished
    before = (folder / "run" / "report.json").read_bytes()
    done = run(recipe)
    assert "is finished" in done.stderr and "jpqd_int8" in done.stdout
    assert (folder / "run" / "report.json").read_bytes() == before
    refused = run(recipe, "--set", "stages.jpqd.train.lr=0.5", check=2)
    assert "recipe.stages.jpqd.train.lr was 0.002 and is 0.5" in refused.stderr and "--fresh" in refused.stderr
    changed = folder / "reviews.csv"
    text = changed.read_text()
    try:
        changed.write_text(text.replace("rotten", "fresh", 1))
        assert "data_hash" in run(recipe, check=2).stderr
    finally:
        changed.write_text(text)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["report", str(folder / "run")]) == 0
    assert "jpqd_int8" in shown.getvalue()


KILL_AT = {
    "training": "stages/dense/0-train/checkpoint-14/manifest.json",
    "writing a checkpoint": "stages/dense/0-train/checkpoint-7/optimizer.json",
    "warm-up": "stages/jpqd/0-warmup/checkpoint-14",
    "boundary": "stages/jpqd/0-warmup/.model*",
    "fine-tuning": "stages/jpqd/1-finetune/checkpoint-7/manifest.json",
    "export": "export/.pruned_fp32*",
    "evaluation": "export/jpqd_int8.json",
    "latency": "export/jpqd_int8_emb4.json",
}


def continued(finished, tmp_path, pattern):
    """Kill a copy of the run at `pattern`, continue it, and compare with the uninterrupted one."""
    source, _, _ = finished
    for name in ("bert", "reviews.csv"):
        target = tmp_path / name
        shutil.copytree(source / name, target) if (source / name).is_dir() else shutil.copy(source / name, target)
    described = yaml.safe_load((source / "tiny.yaml").read_text())
    # the recipe itself must be the same, so the inputs stay where they were
    described["output"]["dir"] = str(tmp_path / "run")
    recipe = tiny.write(described, tmp_path / "tiny.yaml")
    assert kill_at(recipe, tmp_path / "run", pattern) == -signal.SIGKILL
    assert not (tmp_path / "run" / "report.json").exists()
    done = run(recipe)
    assert not differences(metrics(tmp_path / "run"), metrics(source / "run"))
    return done


@pytest.mark.long  # test_run_epochs kills one where checkpoint and evaluation meet
@pytest.mark.parametrize("phase", sorted(KILL_AT))
def test_a_run_killed_anywhere_continues_to_the_same_numbers(finished, tmp_path, phase):
    continued(finished, tmp_path, KILL_AT[phase])


@pytest.mark.long
def test_ctrl_c_leaves_a_checkpoint_and_the_run_continues(finished, tmp_path):
    source, _, _ = finished
    described = yaml.safe_load((source / "tiny.yaml").read_text())
    described["output"]["dir"] = str(tmp_path / "run")
    recipe = tiny.write(described, tmp_path / "tiny.yaml")
    assert kill_at(recipe, tmp_path / "run", KILL_AT["warm-up"], signal.SIGINT) == 130
    found = sorted((tmp_path / "run" / "stages" / "jpqd" / "0-warmup").glob("checkpoint-*/manifest.json"))
    assert found
    run(recipe)
    assert not differences(metrics(tmp_path / "run"), metrics(source / "run"))


@pytest.mark.long
def test_a_full_disk_is_said_and_the_run_continues_when_there_is_space(finished, tmp_path):
    """The limit on the size of a file stands in for the disk: the system call fails in the same place."""
    source, _, _ = finished
    described = yaml.safe_load((source / "tiny.yaml").read_text())
    described["output"]["dir"] = str(tmp_path / "run")
    recipe = tiny.write(described, tmp_path / "tiny.yaml")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY));"
    script = f"{limit} from mptrain.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *command(recipe)[3:]], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    (said,) = [line for line in done.stderr.splitlines() if "the disk is full" in line]
    assert "continues the run" in said
    run(recipe)
    assert not differences(metrics(tmp_path / "run"), metrics(source / "run"))


@pytest.mark.long
def test_a_second_live_run_is_refused(finished, tmp_path):
    source, _, _ = finished
    described = yaml.safe_load((source / "tiny.yaml").read_text())
    described["output"]["dir"] = str(tmp_path / "run")
    recipe = tiny.write(described, tmp_path / "tiny.yaml")
    first = subprocess.Popen(command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "stages").exists():
            assert first.poll() is None
            time.sleep(0.01)
        assert "in use by another live run" in run(recipe, check=2).stderr
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["data.label=stars"], ["data.label", "stars", "label"]),
        (["data.train=nowhere.csv"], ["nowhere.csv", "data.train"]),
        (["model.path=./nowhere"], ["model.path", "nowhere"]),
        (["model.trust_remote_code=true"], ["--allow-code"]),
        (["model.modeling=evil.py"], ["--allow-code"]),
        (["model.task=text-clasification"], ["Did you mean 'text-classification'"]),
        (["stages.jpqd.quantize.ignore=[encoder.layer.9]"], ["encoder.layer.9"]),
        (["stages.jpqd.prune.ignore=[nothing.like.this]"], ["nothing.like.this"]),
        (["stages.jpqd.prune.keep.encoder_params=0.01"], ["encoder_params"]),
        (["evaluate.latency.length=[1024]"], ["evaluate.latency.length", "1024", "64 tokens"]),
        (["output.dir=/proc/mptrain"], ["output.dir", "cannot be written"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) and "=" in x[0] else "",
)
def test_wrong_input_is_one_paragraph_and_exit_2(finished, tmp_path, change, expected):
    _, recipe, _ = finished
    changes = [f"output.dir={tmp_path / 'run'}", "stages.dense.train.epochs=0.05", *change]
    options = [word for c in changes for word in ("--set", c)]
    done = run(recipe, *options, check=2)
    message = done.stderr[done.stderr.index("mptrain: error: ") :]
    for part in expected:
        assert part in message
    assert len(message.strip().splitlines()) <= 2, message


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis_and_exit_1(finished, tmp_path):
    _, recipe, _ = finished
    sets = [f"output.dir={tmp_path / 'run'}", "stages.dense.train.lr=1e30", "stages.dense.train.max_grad_norm=0"]
    done = run(recipe, *[w for s in sets for w in ("--set", s)], check=1)
    assert "The loss became" in done.stderr and "stages.dense.train.lr" in done.stderr


def test_a_missed_gate_is_exit_3_with_the_whole_report(finished, tmp_path):
    source, _, _ = finished
    shutil.copytree(source / "run", tmp_path / "run")
    described = yaml.safe_load((source / "tiny.yaml").read_text())
    described["output"]["dir"] = str(tmp_path / "run")
    described["gates"] = {"min_size_ratio": 1000}
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    identity["recipe"]["gates"]["min_size_ratio"] = 1000.0
    (tmp_path / "run" / "run.json").write_text(json.dumps(identity))
    (tmp_path / "run" / "report.json").unlink()
    done = run(tiny.write(described, tmp_path / "tiny.yaml"), check=3)
    assert "gate" in done.stderr and "1000" in done.stderr and "jpqd_int8" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
