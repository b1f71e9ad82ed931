"""Python in a process of its own, without the seconds that imports take: forked from a server that has done them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SLOW = ["torch", "transformers", "accelerate", "openvino", "nncf.torch", "mptrain.cli", "mptrain.run", "kit.tiny"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(SLOW)


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def start(*words: str, cwd: Path, output: Path | None = None, **environment: str) -> Any:
    """A process that runs `python WORDS` (a script, -m MODULE or -c CODE) with arguments; stdout and stderr go into
    files of that name in `output`, or nowhere. It has this environment, of which the server knows only what there was
    when it started."""
    environment = {**os.environ, **environment}
    process = _SERVER.Process(target=_child, args=(words, str(cwd), output and str(output), environment))
    process.start()
    return process


def python(*words: str, cwd: Path, output: Path, timeout: float = 400, **environment: str) -> Ended:
    """Run to its end; output: a folder for what it prints."""
    process = start(*words, cwd=cwd, output=output, **environment)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{words} took more than {timeout} s")
    shown = [(output / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
    return Ended(process.exitcode, *shown)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""what accelerate launch tells processes that shard a model"""


def launched(*words: str, count: int, cwd: Path, output: Path, timeout: float = 400, **environment: str) -> Ended:
    """`python WORDS` in `count` gloo processes with the environment of accelerate launch; where one fails, the others
    are killed. stdout and stderr: of all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", **environment}
    started, folders = [], []
    for rank in map(str, range(count)):
        folders.append(output / f"rank{rank}")
        folders[-1].mkdir(parents=True, exist_ok=True)
        started.append(start(*words, cwd=cwd, output=folders[-1], RANK=rank, LOCAL_RANK=rank, **common))
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in started) and not any(p.exitcode for p in started):
        assert time.monotonic() < deadline, f"{words} took more than {timeout} s"
        time.sleep(0.02)
    status = next((p.exitcode for p in started if p.exitcode), 0)
    for process in started:
        process.kill()
        process.join()
    shown = ["".join((f / n).read_text(errors="replace") for f in folders) for n in ("stdout", "stderr")]
    return Ended(status, *shown)


def ranks(worker: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """worker(rank, *arguments) in `count` processes; an error of one is raised here."""
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")


def _child(words: tuple[str, ...], cwd: str, output: str | None, environment: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = os.devnull if output is None else os.path.join(output, name)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    try:
        _run(words)
        status: Any = 0
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _run(words: tuple[str, ...]) -> None:
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
