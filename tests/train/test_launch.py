from __future__ import annotations

import pytest

from mptrain.recipe import file
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
