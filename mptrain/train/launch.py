"""Processes: which rank this is, and whether as many run as were asked for.

`accelerate launch --cpu --num_processes 2` starts ONE process and says nothing. So the
number in the launcher's command line and config file is compared with the one that runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from mptrain.core.errors import UserError
from mptrain.recipe import MixedPrecision
from mptrain.recipe import file as bundled

Sharding = Literal["", "fsdp1", "fsdp2", "deepspeed"]
REFUSED: dict[Sharding, str] = {
    "deepspeed": "mptrain does not train under DeepSpeed: launch with FSDP2 (mptrain copy accelerate-fsdp2-2gpu) or DDP"
    " (accelerate-ddp-2gpu)",
    "fsdp1": "mptrain does not train under FSDP1: write fsdp_version: 2 in the fsdp_config of the launcher's file"
    " (mptrain copy accelerate-fsdp2-2gpu)",
}


@dataclass(frozen=True)
class Launch:
    """How processes are started. sharding: what shares out parameters; "", each process holds the model.
    one_loads: only one process reads weights from disk (fsdp_cpu_ram_efficient_loading)."""

    processes: int = 1
    machines: int = 1
    sharding: Sharding = ""
    mixed_precision: str = "no"
    one_loads: bool = False

    def words(self) -> str:
        names = {"": "DDP, each holds the model", "fsdp2": "FSDP2, each holds a part of the model"}
        name = names.get(self.sharding, self.sharding)
        where = f" on {self.machines} machines" if self.machines > 1 else ""
        return f"{self.processes} processes{where}: {name}" if self.processes > 1 else "one process"


def check(launch: Launch, precision: MixedPrecision) -> None:
    """What neither a recipe nor a Trainer does when launched so. Raises UserError."""
    if launch.sharding in REFUSED:
        raise UserError(REFUSED[launch.sharding])
    if precision.compute != "fp32" and launch.mixed_precision != "no":
        raise UserError(
            f"precision and Accelerate's mixed_precision={launch.mixed_precision!r} exclude each other: write"
            " mixed_precision: 'no' in the launcher's file, launch with --mixed_precision no, or unset"
            " ACCELERATE_MIXED_PRECISION"
        )
    if launch.sharding == "fsdp2" and (why := precision.why_not_sharded()):
        raise UserError(why)


def on_one_process(why: str) -> UserError:
    """Of fsdp_cpu_ram_efficient_loading, where it does not go: `why`."""
    return UserError(
        f"fsdp_cpu_ram_efficient_loading leaves the weights on one process, and {why}: write false in the launcher's"
        " file"
    )


def current(processes: int) -> Launch:
    """As `accelerate launch` has told this process."""

    def said(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1")

    kind: Sharding = ""
    if said("ACCELERATE_USE_DEEPSPEED"):
        kind = "deepspeed"
    elif said("ACCELERATE_USE_FSDP") and processes > 1:
        kind = "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return Launch(processes, 1, kind, mixed, said("FSDP_CPU_RAM_EFFICIENT_LOADING"))


def read(name: str) -> Launch:
    """A configuration of `accelerate launch`: a file, or the name of a bundled one. Raises UserError."""
    import yaml

    path = next((p for p in bundled.configs() if p.stem == name), Path(name).expanduser())
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        names = ", ".join(p.stem for p in bundled.configs())
        raise UserError(f"--launch: {name} cannot be read ({error}); give a file, or one of {names}.") from None
    if not isinstance(found, dict) or "distributed_type" not in found:
        raise UserError(f"--launch: {name} has no distributed_type, so it is no file of accelerate config.")
    processes, machines = found.get("num_processes"), found.get("num_machines", 1)
    if not isinstance(processes, int) or not isinstance(machines, int) or machines < 1 or processes % machines:
        raise UserError(
            f"--launch: {name}: num_processes counts those of all machines and must be a multiple of num_machines"
            f" ({machines}), got {processes}."
        )
    fsdp = found.get("fsdp_config") or {}
    kinds: dict[str, Sharding] = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp1"}
    kind = kinds.get(str(found["distributed_type"]), "")
    if kind == "fsdp1" and str(fsdp.get("fsdp_version")) == "2":
        kind = "fsdp2"
    one_loads = str(fsdp.get("fsdp_cpu_ram_efficient_loading", False)).lower() == "true"
    return Launch(processes, machines, kind, str(found.get("mixed_precision") or "no"), one_loads)


def state() -> PartialState:
    """This process among its peers. Raises UserError when fewer or more run than were asked for, or under DeepSpeed."""
    if current(1).sharding == "deepspeed":
        raise UserError(REFUSED["deepspeed"])
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
