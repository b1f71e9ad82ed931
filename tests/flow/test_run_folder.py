"""The run folder: one live run, stale locks, and identity."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from filelock import FileLock

from mptrain.core.disk import write_json
from mptrain.core.errors import ResumeError, UserError
from mptrain.flow.run_folder import check_identity, clear, is_live, locked

IDENTITY = {
    "format": 2,
    "recipe": {"seed": 1, "stages": [{"id": "dense", "train": {"lr": 0.1}}]},
    "data_hash": "abc",
    "versions": {"torch": "2"},
    "processes": 1,
}


def changed(**kwargs):
    return {**IDENTITY, **kwargs}


def test_a_second_live_run_is_refused_and_a_dead_ones_lock_taken_over(tmp_path):
    code = "import sys,time; from pathlib import Path; from mptrain.flow.run_folder import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by another live run \\(process {holder.pid}\\)"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked(tmp_path):
        assert (tmp_path / ".lock-holder").read_text() == f"{os.getpid()}\n"


def test_who_asks_whether_a_run_is_live_is_not_taken_for_one(tmp_path):
    """Two runs that are started together with the same --reuse ask at the same moment."""
    with locked(tmp_path):
        assert is_live(tmp_path)
    asking = FileLock(tmp_path / "lock", thread_local=False)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    assert not is_live(tmp_path)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    with locked(tmp_path):
        pass


def test_the_identity_names_what_changed(tmp_path):
    check_identity(tmp_path, IDENTITY)
    check_identity(tmp_path, IDENTITY)
    recipe = {"seed": 1, "stages": [{"id": "dense", "train": {"lr": 0.2}}]}
    with pytest.raises(ResumeError, match=r"recipe\.stages\.dense\.train\.lr was 0\.1 and is 0\.2"):
        check_identity(tmp_path, changed(recipe=recipe))
    with pytest.raises(ResumeError, match="data_hash was 'abc' and is 'x'"):
        check_identity(tmp_path, changed(data_hash="x"))
    with pytest.raises(ResumeError, match=r"versions\.torch was '2' and is '3'"):
        check_identity(tmp_path, changed(versions={"torch": "3"}))
    with pytest.raises(ResumeError, match="processes was 1 and is 2"):
        check_identity(tmp_path, changed(processes=2))


def test_a_run_of_another_format_is_not_continued(tmp_path):
    check_identity(tmp_path, {key: value for key, value in IDENTITY.items() if key != "format"})
    with pytest.raises(ResumeError, match=r"a run of another version of mptrain \(its stages have format 1"):
        check_identity(tmp_path, IDENTITY)


def test_a_folder_of_somebody_else_is_neither_used_nor_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no run of mptrain"):
        check_identity(tmp_path, IDENTITY)
    with pytest.raises(UserError, match="nothing was deleted"):
        clear(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_fresh_deletes_an_earlier_run(tmp_path):
    check_identity(tmp_path, IDENTITY)
    write_json(tmp_path / "stages" / "dense" / "done.json", {})
    with locked(tmp_path):
        clear(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"lock", ".lock-holder"}


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'
