"""What only POSIX or Linux has is not needed: locks, memory and processors come from libraries, or with a way out."""

from __future__ import annotations

import ast
from pathlib import Path

import mptrain
from mptrain.core import host

ROOT = Path(mptrain.__file__).parent
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix", "msvcrt", "winreg"}
FUNCTIONS = {
    *("sysconf", "getuid", "geteuid", "getgid", "fork", "killpg", "setsid", "getpgid", "uname", "statvfs", "mkfifo"),
    *("getloadavg", "O_NOFOLLOW", "O_DIRECTORY", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "sched_yield"),
}


def test_nothing_that_windows_lacks_is_imported_or_called():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    assert not {alias.name for alias in names} & MODULES, path
                case ast.ImportFrom(module=str(module)):
                    assert module not in MODULES, path
                case ast.Attribute(value=ast.Name(id="os" | "signal"), attr=name):
                    assert name not in FUNCTIONS, f"{path}: {name}"


def test_a_machine_without_proc_is_described(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "none")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    found = host.host()
    assert found["cpu"] and found["cpu_flags"] == [] and found["cores_usable"] == found["cores"] >= 1
    assert found["ram_bytes"] > 2**28
