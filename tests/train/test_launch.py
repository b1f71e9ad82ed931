from __future__ import annotations

from dataclasses import replace

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mptrain.core.errors import UserError
from mptrain.recipe import file
from mptrain.train import launch
from mptrain.train.launch import asked_processes

CONFIGS = file.folder("configs")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "/bin/accelerate", "launch", "--num_processes", "2", "job.py"], 2),
        (["python", "/bin/accelerate", "launch", "--num-processes=4", "-m", "mptrain"], 4),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mptrain"], 2),
        (["/bin/accelerate-launch", "--num_processes", "3", "job.py"], 3),
        (["accelerate", "launch", "job.py", "--num_processes", "9"], None),
        (["python", "-m", "mptrain", "recipe", "x"], None),
        ([], None),
    ],
)
def test_the_launcher_is_asked(command, expected):
    assert asked_processes(command) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("1cpu", 1), ("gloo-2cpu", 2), ("ddp-2gpu", 2), ("fsdp2-2gpu", 2), ("fsdp2-gloo-2cpu", 2)],
)
def test_the_configs_say_how_many(name, expected):
    path = CONFIGS / f"accelerate-{name}.yaml"
    assert asked_processes(["accelerate", "launch", "--config_file", str(path), "-m", "mptrain"]) == expected


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("fsdp2-2gpu", 2, 1), ("fsdp2-8gpu", 8, 1), ("fsdp2-2x8gpu", 16, 2)]
)
def test_accelerate_reads_a_configuration_as_we_do(name, processes, machines, monkeypatch):
    """What `accelerate launch` would put into the environment of a process."""
    parser = accelerate_launch.launch_command_parser()
    path = str(CONFIGS / f"accelerate-{name}.yaml")
    args, *_ = accelerate_launch._validate_launch_command(parser.parse_args(["--config_file", path, "-m", "mptrain"]))
    args.main_process_port = 0  # of this machine, any that is free
    environment = prepare_multi_gpu_env(args)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and not plugin.cpu_ram_efficient_loading
    assert (args.num_processes, args.num_machines) == (processes, machines)
    found = launch.read(f"accelerate-{name}")
    assert found == launch.Launch(processes, machines, "fsdp2") == launch.read(path)
    assert launch.current(processes) == replace(found, machines=1)
    assert launch.current(1).sharding == "", "one process holds the whole model"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("distributed_type: FSDP\nnum_processes: 3\nnum_machines: 2\n", "multiple of num_machines"),
        ("num_processes: 2\n", "has no distributed_type"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text, says, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        launch.read(str(tmp_path / "x.yaml"))


def test_deepspeed_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="mptrain does not train under DeepSpeed: launch with FSDP2"):
        launch.state()
