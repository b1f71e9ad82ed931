"""A recipe run as a user runs it: in this process, in one of its own, killed; and what of its report must be equal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from kit.processes import start
from mptrain.cli import main


def command(recipe, *options):
    return [sys.executable, "-m", "mptrain", "recipe", str(recipe), *options]


@dataclass
class Done:
    stdout: str
    stderr: str


def run(recipe, *options, check=0):
    """The command line in this process: what it prints, with the exit status checked."""
    out, err = io.StringIO(), io.StringIO()
    level, propagate = logging.getLogger("mptrain").level, logging.getLogger("mptrain").propagate
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        status = main(["recipe", str(recipe), *options])
    logging.getLogger("mptrain").handlers.clear()
    logging.getLogger("mptrain").setLevel(level)
    logging.getLogger("mptrain").propagate = propagate
    assert status == check, out.getvalue()[-2000:] + err.getvalue()[-4000:]
    return Done(out.getvalue(), err.getvalue())


def metrics(folder):
    """What must not depend on interruptions: scores, sizes, structure, parity, losses."""
    report = json.loads((folder / "report.json").read_text())
    keys = ("id", "metrics", "size_bytes", "params", "macs", "parity", "runtime")
    return {
        "variants": [{k: v.get(k) for k in keys} for v in report["variants"]],
        "comparisons": [{k: v for k, v in c.items() if k != "speedup"} for c in report["comparisons"]],
        "structure": report["structure"],
        "history": report["history"],
    }


def differences(a, b, path=""):
    """Where two JSON values differ, as lines."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a!r} is not {b!r}"]


def kill_at(recipe, folder, pattern, number=signal.SIGKILL):
    """Start the run, send the signal once a file of that pattern is there. Returns the exit status."""
    process = start(*command(recipe)[1:], cwd=Path.cwd())
    try:
        deadline = time.monotonic() + 400
        while not list(folder.glob(pattern)):
            assert process.is_alive(), f"the run ended before {pattern} was there"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode
    finally:
        if process.is_alive():
            process.kill()
            process.join()
