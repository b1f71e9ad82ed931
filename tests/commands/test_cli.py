"""Commands that run nothing, and what a user sees when something is missing."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from kit import report_sample

from mptrain.cli import MAIN_SPEAKS_FIRST, main
from mptrain.recipe import file


def test_list_and_show_print_the_files_unchanged(capsysbinary):
    assert main(["list"]) == 0
    listed = capsysbinary.readouterr().out.decode()
    for path in file.bundled():
        assert path.stem in listed
    assert main(["show", "jpqd-bert"]) == 0
    assert capsysbinary.readouterr().out == (file.folder("recipes") / "jpqd-bert.yaml").read_bytes()


def test_copy_never_overwrites(tmp_path, capsys):
    assert main(["copy", "quickstart", str(tmp_path)]) == 0
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_bytes() == file.find("quickstart").read_bytes()
    copied.write_text("mine")
    assert main(["copy", "quickstart", str(tmp_path)]) == 2
    assert copied.read_text() == "mine" and "exists already" in capsys.readouterr().err
    assert main(["copy", "quickstart", str(tmp_path / "no" / "where.yaml")]) == 2


def test_a_report_that_is_not_there(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "there is no report here" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "not finished" in capsys.readouterr().err


def test_resume_needs_a_run(tmp_path, capsys):
    out = ["--set", f"output.dir={tmp_path / 'run'}"]
    assert main(["recipe", "quickstart", "--resume", *out]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert main(["recipe", "quickstart", "--resume", "--fresh", *out]) == 2
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    for name in [n for n in sys.modules if n == "mptrain.run" or n.startswith("mptrain.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["recipe", "quickstart", "--set", f"output.dir={tmp_path / 'run'}"]) == 1
    assert "pip install 'mptrain[openvino]'" in capsys.readouterr().err


OWN_DATA = {"encrypted-sst"}
"""recipes whose data a user makes first"""


@pytest.mark.parametrize("path", file.bundled(), ids=lambda p: p.stem)
def test_every_bundled_recipe_has_a_dry_run_without_a_network(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    status = main(["recipe", path.stem, "--dry-run"])
    shown = capsys.readouterr()
    if path.stem in OWN_DATA:
        assert status == 2 and "data.train: there is no file" in shown.err
    else:
        assert status == 0 and "Phases" in shown.out and "Variants" in shown.out and "baseline_" in shown.out
    assert not list(tmp_path.iterdir()), "a dry run downloads nothing"


def test_launcher_configurations_are_listed_and_copied(tmp_path, capsys):
    assert main(["list"]) == 0
    assert "accelerate-gloo-2cpu       Two processes on the CPUs" in capsys.readouterr().out
    assert main(["copy", "accelerate-gloo-2cpu", str(tmp_path)]) == 0
    copied = tmp_path / "accelerate-gloo-2cpu.yaml"
    assert copied.read_bytes() == (file.folder("configs") / copied.name).read_bytes()
    assert f"accelerate launch --config_file {copied} -m mptrain recipe" in capsys.readouterr().out


def test_a_recipe_that_is_not_utf8_is_said(tmp_path, capsys):
    path = tmp_path / "latin.yaml"
    path.write_bytes("description: café\n".encode("latin-1"))
    assert main(["show", str(path)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_report_is_also_found_by_its_file(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report_sample.report()))
    assert main(["report", str(tmp_path / "report.json")]) == 0
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_too_little_memory_is_said_with_the_fix(monkeypatch, capsys, error):
    def refuse(options):
        raise error

    monkeypatch.setattr("mptrain.commands.validate.run", refuse)
    assert main(["validate", "quickstart"]) == 1
    assert "lower train.batch_size" in capsys.readouterr().err


def test_of_many_processes_the_main_one_speaks_first_and_each_names_itself(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("mptrain.cli.time.sleep", waited.append)
    for rank, start, seconds in (("0", "mptrain: error: ", []), ("3", "mptrain: error: rank 3: ", [MAIN_SPEAKS_FIRST])):
        monkeypatch.setenv("RANK", rank)
        assert main(["recipe", "no-such-recipe"]) == 2
        assert capsys.readouterr().err.startswith(start + "No recipe") and waited == seconds
