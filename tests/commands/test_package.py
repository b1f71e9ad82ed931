"""The public surface, the bundled files, and that help is quick to answer."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mptrain
from mptrain.recipe import file

HEAVY = {"torch", "transformers", "nncf", "openvino", "datasets", "sklearn", "matplotlib", "accelerate", "pydantic"}


def test_the_public_names_are_exactly_all():
    assert dir(mptrain) == sorted(mptrain.__all__)
    for name in mptrain.__all__:
        assert callable(getattr(mptrain, name))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        mptrain.lod  # noqa: B018


def test_no_public_name_is_a_submodule():
    modules = {m.name for m in pkgutil.iter_modules(mptrain.__path__)}
    assert not modules & set(mptrain.__all__)


def test_help_imports_nothing_heavy():
    code = "import sys; from mptrain.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert "recipe" in done.stdout and not loaded & HEAVY


def test_no_file_imports_pickle_or_loads_without_weights_only():
    root = Path(mptrain.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_from_disk"):
                assert "weights_only=True" in ast.unparse(node) or "torch.load" not in ast.unparse(node), path


def test_the_wheel_has_recipes_configs_and_type_marker(tmp_path):
    root = Path(mptrain.__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {p.name for p in (tmp_path / "site" / "mptrain").rglob("*")}
    assert {p.name for p in file.bundled()} <= names
    assert {"accelerate-gloo-2cpu.yaml", "py.typed", "page.html.j2"} <= names
    code = "from mptrain.cli import main; main(['list']); main(['validate', 'quickstart'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert "jpqd-bert" in done.stdout and "quickstart.yaml: valid" in done.stdout
    assert str(tmp_path) in done.stdout
