"""The notebooks of docs/notebooks run, and what is committed is what they show."""

from __future__ import annotations

import json
import warnings

import pytest

from scripts import notebooks

NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_was_run(path):
    cells = code(json.loads(path.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output["data"] for cell in cells for output in cell["outputs"] if "data" in output]
    assert sum("<table>" in "".join(data.get("text/html", [])) for data in shown) >= 3


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader sees them
        done, kept = notebooks.run(path), json.loads(path.read_text(encoding="utf-8"))
    kinds = [[[output["output_type"] for output in cell["outputs"]] for cell in code(one)] for one in (done, kept)]
    assert kinds[0] == kinds[1]


def test_an_error_of_a_cell_is_raised_with_its_number(tmp_path):
    cells = [{"cell_type": "code", "source": [text], "outputs": []} for text in ("x = 1\nx + 1", "missing")]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(NameError) as error:
        notebooks.run(tmp_path / "a.ipynb")
    assert error.value.__notes__ == ["in cell 2 of a.ipynb"]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells[:1]}))
    (output,) = notebooks.run(tmp_path / "a.ipynb")["cells"][0]["outputs"]
    assert output["data"] == {"text/plain": ["2"]}
