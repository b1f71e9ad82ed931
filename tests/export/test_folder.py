"""The folder of an exported model: whole or not there, also when an export was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mptrain.core.disk import whole

KILLED = """
import os, signal, sys
from pathlib import Path
from mptrain.core.disk import whole

with whole(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(folder, text):
    with whole(folder) as scratch:
        (scratch / "model").write_text(text)


def test_a_whole_folder_takes_the_place_of_an_older_one(tmp_path):
    write(tmp_path / "a_fp32", "old")
    write(tmp_path / "a_fp32", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a_fp32"]
    assert (tmp_path / "a_fp32" / "model").read_text() == "new"


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path / "a_fp32", "old")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a_fp32"):
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["a_fp32"]


def test_what_a_killed_export_left_goes_with_the_next_of_its_name(tmp_path):
    for name in ("a_fp32", "b_fp32", "a_fp32.c_fp32"):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)])
        assert killed.returncode == -signal.SIGKILL
    others = [".a_fp32.original", "a_fp32.bak"]
    for name in others:
        (tmp_path / name).mkdir()
    assert len(os.listdir(tmp_path)) == 5
    write(tmp_path / "a_fp32", "new")
    left = sorted(p.name.partition("mptrain-")[0] for p in tmp_path.iterdir())
    assert left == sorted([*others, "a_fp32", ".b_fp32.", ".a_fp32.c_fp32."])
