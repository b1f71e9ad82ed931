"""kill -9 at a random moment, and the same command again: the final numbers must be those of a run that was let be.

Case n is a recipe, a number of processes and a moment, the same everywhere. A run is forked from this process, where
everything is imported already, so that its time is the run's own; of several processes one is killed, and the others
up to a second later, as a launcher would. The first case of a kind runs once undisturbed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kit import tiny, tiny_tasks
from kit.jobs import differences, metrics

from benchmarks.soak.cases import Outcome
from mptrain.cli import main

SECONDS = 600
_GLOO = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}


def _jpqd(folder: Path) -> dict[str, Any]:
    recipe = tiny.jpqd(folder)
    recipe["stages"][0]["train"]["epochs"] = 2
    return recipe


def _palettize(folder: Path) -> dict[str, Any]:
    tables = {"method": "skm", "bits": 3, "group_size": 8, "finetune": {"refresh": 1}}
    recipe = _jpqd(folder)
    train = {"epochs": 2, "lr": 1e-3, "batch_size": 8, "checkpoint_steps": 7}
    recipe["stages"] = [recipe["stages"][0], {"id": "tables", "train": train, "palettize": tables}]
    recipe["export"] = [
        {"id": "ml", "format": "coreml", "of": ["tables"], "precision": ["fp32"], "shapes": {"length": [1, 32]}}
    ]
    return recipe


def _llm(folder: Path) -> dict[str, Any]:
    recipe = tiny_tasks.recipe("causal-lm", folder)
    recipe["stages"][0]["train"] |= {"epochs": 2, "checkpoint_steps": 5}
    int4 = {"mode": "weight_only", "method": "gptq", "block_size": 16}
    recipe["stages"] = [recipe["stages"][0], {"id": "int4", "quantize": int4}]
    recipe["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "int4"], "precision": ["fp32", "compressed"]}
    ]
    return recipe


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {"jpqd": _jpqd, "palettize": _palettize, "llm": _llm}
KINDS = [(name, processes) for processes in (1, 2) for name in RECIPES]


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its seconds, and the numbers of its report."""

    seconds: float
    metrics: dict[str, Any]


class Kills:
    """folder: for inputs and runs; it is kept for all cases of a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wholes: dict[tuple[str, int], Whole] = {}

    def case(self, number: int) -> Outcome:
        """Outcome kinds: "same"; "crash" (the run that continues fails), "timeout", "silent" (other numbers)."""
        draw = random.Random(number)
        name, processes = KINDS[number % len(KINDS)]
        if (name, processes) not in self.wholes:
            begun = time.monotonic()
            path = self._recipe(name, f"whole{processes}")
            if (status := self._run(path, processes, None, draw)) != 0:
                return Outcome("crash", f"undisturbed: status {status}", name)
            seconds = time.monotonic() - begun
            self.wholes[name, processes] = Whole(seconds, metrics(self.folder / name / f"whole{processes}"))
        whole = self.wholes[name, processes]
        moment = draw.uniform(0, 0.95)
        where = f"{name}, {processes} processes, at {moment:.3f} of {whole.seconds:.0f} s"
        path = self._recipe(name, "killed")
        shutil.rmtree(self.folder / name / "killed", ignore_errors=True)
        self._run(path, processes, moment * whole.seconds, draw)
        status = self._run(path, processes, None, draw)
        if status is None:
            return Outcome("timeout", where, self._log.read_text()[-300:])
        if status:
            return Outcome("crash", f"{where}: status {status}", self._log.read_text()[-300:])
        found = differences(metrics(self.folder / name / "killed"), whole.metrics)
        return Outcome("silent", where, "; ".join(found[:3])) if found else Outcome("same", where)

    def _recipe(self, name: str, run: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{run}.yaml"
        if not path.is_file():
            recipe = RECIPES[name](folder)
            recipe["output"] = {"dir": str(folder / run)}
            path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _run(self, recipe: Path, processes: int, kill_after: float | None, draw: random.Random) -> int | None:
        """Status of the run; None after `kill_after` or the time limit."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [self._fork(recipe, rank, processes, port) for rank in range(processes)]
        deadline = time.monotonic() + (SECONDS if kill_after is None else kill_after)
        statuses: dict[int, int] = {}
        while len(statuses) < processes and time.monotonic() < deadline and not any(statuses.values()):
            for pid in set(ranks) - statuses.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        left = [pid for pid in ranks if pid not in statuses]
        draw.shuffle(left)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            if pid != left[-1]:
                time.sleep(draw.uniform(0, 1))
        for pid in left:
            os.waitpid(pid, 0)
        return None if left and not any(statuses.values()) else max(statuses.values(), key=abs)

    def _fork(self, recipe: Path, rank: int, processes: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if processes > 1:
                os.environ |= {**_GLOO, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            status = main(["recipe", str(recipe)])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
