"""Processes: which rank this is, and whether as many run as were asked for.

`accelerate launch --cpu --num_processes 2` starts ONE process and says nothing. So the
number in the launcher's command line and config file is compared with the one that runs.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState

from mptrain.core.errors import UserError


def state() -> PartialState:
    """This process among its peers. Raises UserError when fewer or more run than were asked for."""
    wanted = asked_processes(_parent_command())
    peers = PartialState(cpu=_cpu_only())
    if wanted is not None and wanted != peers.num_processes:
        raise UserError(
            f"accelerate launch was asked for {wanted} processes but {peers.num_processes} run."
            " On CPUs the config needs distributed_type: MULTI_CPU or MULTI_GPU with use_cpu: true; use the files"
            " in configs/, e.g. --config_file configs/accelerate-gloo-2cpu.yaml."
        )
    return peers


def _cpu_only() -> bool:
    import torch

    return not torch.cuda.is_available()


def _parent_command() -> list[str]:
    import psutil

    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    except psutil.Error:
        return []


def asked_processes(command: list[str]) -> int | None:
    """The number of processes an `accelerate launch` command line asks for, or None."""
    start = next((i for i, word in enumerate(command) if _is_launcher(command, i, word)), None)
    if start is None:
        return None
    options = _options(command[start + 1 :])
    number: Any = options.get("num_processes")
    if number is None and "config_file" in options:
        import yaml

        try:
            with open(options["config_file"], encoding="utf-8") as file:
                number = (yaml.safe_load(file) or {}).get("num_processes")
        except (OSError, yaml.YAMLError, AttributeError):
            number = None
    return int(number) if str(number).isdigit() else None


def _is_launcher(command: list[str], index: int, word: str) -> bool:
    """`accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`."""
    if word == "launch":
        return index > 0 and os.path.basename(command[index - 1]).startswith("accelerate")
    return os.path.basename(word) == "accelerate-launch" or word == "accelerate.commands.launch"


def _options(words: list[str]) -> dict[str, str]:
    """The --name value and --name=value pairs before the script or module."""
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        if word in ("-m", "--module") or word.endswith(".py"):
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            options[name.replace("-", "_")] = value if equals else following
    return options
