"""A finished report as the input of `mptrain report`, whose folder may not be the user's to write."""

import errno
import json
import re

import pytest
from kit import report_sample as sample

from mptrain.cli import main
from mptrain.core.errors import UserError
from mptrain.report import words
from mptrain.report.render.files import PAGES, read, render


def test_a_folder_that_cannot_be_written_is_said_with_the_fix(tmp_path, monkeypatch):
    report = sample.report()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)  # a mode would not stop root
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(tmp_path))}: cannot be written \(Permission denied\)\. .*copy"
    ):
        render(report, tmp_path)


def test_a_folder_that_is_none_or_holds_a_folder_in_place_of_a_page(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"report.json: cannot be written \(Not a directory\)"):
        render(sample.report(), tmp_path / "report.json")
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        render(sample.report(), tmp_path)


def test_a_full_disk_is_no_wrong_input(tmp_path, monkeypatch):
    report = sample.report()

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(OSError, match="No space left"):
        render(report, tmp_path)


def broken(report):
    raise KeyError("a method of tomorrow")


def test_a_page_that_cannot_be_drawn_costs_neither_the_others_nor_what_was_there(tmp_path, monkeypatch, caplog):
    render(sample.report(), tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.md").unlink()
    monkeypatch.setitem(PAGES, "report.html", broken)
    written = render(sample.report(), tmp_path)
    assert [path.name for path in written] == ["report.md", "README.md"] and (tmp_path / "report.md").is_file()
    assert (tmp_path / "report.html").read_bytes() == before
    assert "report.html cannot be drawn (KeyError: 'a method of tomorrow'). Nothing is lost" in caplog.text
    assert f"`mptrain report {tmp_path}` draws it again" in caplog.text


def test_a_summary_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog, capsys):
    (tmp_path / "report.json").write_text(json.dumps(sample.report()))
    monkeypatch.setattr("mptrain.report.render.terminal.summary", broken)
    assert main(["report", str(tmp_path)]) == 0
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert "the report cannot be shown here" in caplog.text


def test_a_report_of_another_version_is_said(tmp_path):
    old = sample.report()
    del old["history"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="it lacks history, for another version of mptrain wrote it"):
        read(tmp_path)


def test_larger_is_not_called_smaller():
    assert (words.smaller(5.24), words.smaller(0.88), words.smaller(None)) == (
        "5.24× smaller", "1.14× larger", "n/a smaller",
    )  # fmt: skip
