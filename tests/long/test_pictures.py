"""Every architecture that transformers classifies pictures with: inspected and exported to every format.

Each works, or is refused in one paragraph that names the reason; nothing ends in another error.
"""

from __future__ import annotations

import pytest
from kit import pictures

from mptrain import cli
from mptrain.commands.export import export_model
from mptrain.core.errors import MptrainError
from mptrain.export.formats import FORMATS

pytestmark = [
    pytest.mark.long,
    # coremltools leaves the temporary folder of a conversion that fails to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CODED = {"imagegpt", "shieldgemma2", "siglip2"}
"""read no pictures as they are: no inputs can be made up"""


@pytest.fixture(params=pictures.NAMES)
def folder(request, tmp_path):
    try:
        return pictures.save(request.param, tmp_path / request.param)
    except ImportError as error:
        pytest.skip(str(error).strip()[:80])


def test_inspect(folder, capsys):
    assert cli.main(["inspect", str(folder), "--samples", "2", "--precision", "fp32"]) == 2 * (folder.name in CODED)
    if folder.name in CODED:
        assert "give a recipe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("format", FORMATS)
def test_export(folder, format, tmp_path):
    try:
        facts = export_model(str(folder), tmp_path / "to", format=format, samples=2)
    except MptrainError as error:
        assert "\n\n" not in str(error) and not (tmp_path / "to").exists()
    else:
        assert facts["passed"] and folder.name not in CODED
