"""Two gloo processes under `accelerate launch`: the same losses and structure as one with accumulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from kit import processes, tiny
from safetensors.torch import load_file

from mptrain.compress.weights import records
from mptrain.models import artifact
from mptrain.recipe import file

CONFIGS = file.folder("configs")
ADAPTER = "adapter/adapter_model.safetensors"


def launch(*words, timeout=400, config="gloo-2cpu"):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(CONFIGS / f"accelerate-{config}.yaml"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def forked(count, path, **environment):
    words = ("-m", "mptrain", "recipe", str(path))
    return processes.launched(*words, count=count, cwd=path.parent, output=path.parent, **environment)


def recipe(folder, name, **train):
    described = tiny.jpqd(folder)
    described["model"]["dropout"] = 0.0  # ranks draw different dropout masks
    for stage in described["stages"]:
        stage["train"] |= {"epochs": 2, "log_steps": 1, **train}
    described["export"][0]["precision"] = ["fp32", "int8"]
    described["gates"] = {"fused_attention": None}
    described["output"]["dir"] = str(folder / name)
    return tiny.write(described, folder / f"{name}.yaml")


@pytest.mark.long
def test_two_processes_match_one_with_accumulation(tmp_path):
    two = forked(2, recipe(tmp_path, "two", batch_size=4))
    assert two.status == 0, two.stderr[-4000:]
    assert two.stdout.count("Report: ") == 1, "only one rank prints"
    one = forked(1, recipe(tmp_path, "one", batch_size=4, accumulation=2))
    assert one.status == 0, one.stderr[-4000:]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    losses = [[(r["stage"], r["step"], r["loss"]) for r in report["history"] if "loss" in r] for report in reports]
    assert len(losses[0]) == len(losses[1]) > 50
    for (stage, step, a), (stage_2, step_2, b) in zip(*losses):
        assert (stage, step) == (stage_2, step_2)
        assert a == pytest.approx(b, rel=1e-5), (stage, step)
    assert reports[0]["structure"] == reports[1]["structure"]
    again = forked(2, tmp_path / "two.yaml")
    assert again.status == 0 and again.stdout.count("Report: ") == 1, again.stderr[-4000:]
    refused = forked(1, tmp_path / "two.yaml")
    assert refused.status != 0 and "processes was 2 and is 1" in refused.stderr


def test_compression_shared_by_two_processes_is_that_of_one(tmp_path):
    described = tiny.jpqd(tmp_path)
    block = {"mode": "weight_only", "method": "gptq", "block_size": 16}
    described["stages"] = [
        {"id": "int4", "from": "model", "quantize": block},
        {"id": "skm", "from": "model", "palettize": {"method": "skm", "bits": 3, "group_size": 8}},
    ]
    described["export"] = [
        {"id": "ov", "format": "openvino", "of": ["int4", "skm"], "precision": ["fp32", "compressed"]}
    ]
    described["gates"] = {"fused_attention": None}
    for name, count in (("one", 1), ("two", 2)):
        path = tiny.write(described | {"output": {"dir": str(tmp_path / name)}}, tmp_path / f"{name}.yaml")
        done = forked(count, path)
        assert done.status == 0, done.stderr[-4000:]
    for stage in ("int4", "skm"):
        a, b = (records.of(artifact.load(tmp_path / n / phase_model(tmp_path / n, stage))) for n in ("one", "two"))
        assert a.keys() == b.keys() and len(a) > 10
        for name in a:
            for part, value in vars(a[name]).items():
                other = vars(b[name])[part]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.long
def test_tables_trained_by_two_processes_match_those_of_one_with_accumulation(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["model"]["dropout"] = 0.0
    dense, jpqd = described["stages"]
    tables = {"method": "skm", "bits": 3, "group_size": 8, "finetune": {"refresh": 5}}
    tuned = {"id": "tuned", "teacher": dense["id"], "distill": {"weight": 0.9}, "palettize": tables}
    described["stages"] = [dense, tuned | {"train": dict(jpqd["train"])}]
    described["export"] = [{"id": "ov", "format": "openvino", "of": ["dense", "tuned"], "precision": ["fp32"]}]
    described["gates"] = {"fused_attention": None}
    for name, count, accumulation in (("one", 1, 2), ("two", 2, 1)):
        for stage in described["stages"]:
            stage["train"] |= {"epochs": 2, "log_steps": 1, "batch_size": 4, "accumulation": accumulation}
        path = tiny.write(described | {"output": {"dir": str(tmp_path / name)}}, tmp_path / f"{name}.yaml")
        done = forked(count, path)
        assert done.status == 0, done.stderr[-4000:]
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    losses = [[r["loss"] for r in report["history"] if r["stage"] == "tuned" and "loss" in r] for report in reports]
    assert len(losses[0]) > 20 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (records.of(artifact.load(tmp_path / n / phase_model(tmp_path / n, "tuned"))) for n in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 10
    for name, record in one.items():
        torch.testing.assert_close(two[name].lut, record.lut, rtol=1e-3, atol=1e-4)
        assert float((two[name].indices == record.indices).float().mean()) > 0.99


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16-master", "fp32"])
def test_quantizers_and_a_teacher_under_fsdp2_train_as_one_process(tmp_path, precision):
    for name, count, accumulation, environment in (("one", 1, 2, {}), ("two", 2, 1, processes.FSDP2)):
        path = recipe(tmp_path, name, batch_size=8, accumulation=accumulation, epochs=1)
        described = yaml.safe_load(path.read_text()) | {"precision": precision}
        del described["stages"][1]["prune"]
        done = forked(count, tiny.write(described, path), **environment)
        assert done.status == 0, done.stderr[-4000:]
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    losses = [[(r["stage"], r["step"], r["loss"]) for r in report["history"] if "loss" in r] for report in reports]
    assert len(losses[0]) == len(losses[1]) > 10 and losses[0][-1][0] == "jpqd"
    first = 12  # a difference of one bit moves a weight to another level, and grows from there
    assert [loss for *_, loss in losses[1][:first]] == pytest.approx([loss for *_, loss in losses[0][:first]], rel=1e-5)
    assert [loss for *_, loss in losses[1]] == pytest.approx([loss for *_, loss in losses[0]], rel=1e-3)
    one, two = (artifact.load(tmp_path / n / phase_model(tmp_path / n, "jpqd")).state_dict() for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=5e-3)  # ten steps of the learning rate are 2e-2


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "shared"), [("bf16-master", processes.FSDP2), ("fp32", processes.FSDP2), ("bf16-master", {})]
)
def test_adapters_of_two_processes_train_as_of_one(tmp_path, precision, shared):
    """Over rounded weights; merged when the model is whole again, and rounded anew. Under FSDP2 and DDP."""
    block = {"mode": "weight_only", "method": "rtn", "block_size": 16}
    for name, count, accumulation, environment in (("one", 1, 2, {}), ("two", 2, 1, shared)):
        described = yaml.safe_load(recipe(tmp_path, name).read_text()) | {"precision": precision}
        train = {"epochs": 1, "lr": 3e-3, "batch_size": 8, "accumulation": accumulation, "log_steps": 1}
        described["stages"] = [
            {"id": "int4", "from": "model", "quantize": block},
            {"id": "tuned", "adapters": {"rank": 4}, "train": train, "quantize": block},
        ]
        described["export"] = [{"id": "ov", "format": "openvino", "of": ["tuned"], "precision": ["compressed"]}]
        done = forked(count, tiny.write(described, tmp_path / f"{name}.yaml"), **environment)
        assert done.status == 0, done.stderr[-4000:]
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    losses = [[r["loss"] for r in report["history"] if "loss" in r] for report in reports]
    assert len(losses[0]) > 5 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    facts = [report["methods"]["tuned"]["facts"]["adapters"] for report in reports]
    assert facts[0]["rounded"] > 0 and facts[1] == {**facts[0], "rounded": pytest.approx(facts[0]["rounded"], rel=1e-3)}
    one, two = (load_file(tmp_path / n / phase_model(tmp_path / n, "tuned") / ADAPTER) for n in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 20
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_what_fsdp2_does_not_do_is_said_before_training(tmp_path):
    done = forked(2, recipe(tmp_path, "run"), **processes.FSDP2)
    assert done.status != 0 and "stages.jpqd.prune.schedule: masks act on whole weight matrices" in done.stderr
    assert not (tmp_path / "run" / "stages").exists()


def phase_model(run, stage):
    return json.loads((run / "report.json").read_text())["checkpoints"][stage]


@pytest.mark.long
def test_a_launch_that_silently_runs_one_process_is_refused(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "mptrain", "recipe", str(recipe(tmp_path, "run"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "asked for 2 processes but 1 run" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_failing_rank_ends_all(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\n"
        "from mptrain.train import phase\n"
        "def fail(*a, **k): raise RuntimeError('rank 1 breaks')\n"
        "if os.environ['RANK'] == '1': phase.PhaseTrainer.training_step = fail\n"
        "from mptrain.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = launch(script, "recipe", recipe(tmp_path, "run"))
    assert done.returncode != 0 and "rank 1 breaks" in done.stderr
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.long
def test_two_processes_killed_and_resumed_leave_the_same_history(tmp_path):
    """Also the sums of losses that were not logged yet, which differ between the processes."""
    whole = launch("-m", "mptrain", "recipe", recipe(tmp_path, "whole", batch_size=4, log_steps=5))
    assert whole.returncode == 0, whole.stderr[-4000:]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(CONFIGS / "accelerate-gloo-2cpu.yaml"), "-m", "mptrain", "recipe"]
    killed = recipe(tmp_path, "killed", batch_size=4, log_steps=5)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, str(killed)], **quiet)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("stages/jpqd/0-warmup/checkpoint-7/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    # the launcher puts its workers into sessions of their own, where they would go on without it
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        victim.kill()
    process.wait()
    again = launch("-m", "mptrain", "recipe", killed)
    assert again.returncode == 0 and "resuming jpqd/warmup" in again.stderr, again.stderr[-4000:]
    a, b = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "killed"))
    assert a["history"] == b["history"]
    assert [v["metrics"] for v in a["variants"]] == [v["metrics"] for v in b["variants"]]
