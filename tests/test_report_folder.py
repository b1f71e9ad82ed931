"""A finished report as the input of `mptrain report`, whose folder may not be the user's to write."""

import re

import pytest
import report_sample as sample

from mptrain.errors import UserError
from mptrain.report.render import render


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
