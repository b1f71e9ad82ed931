"""The public surface, the bundled files, and that help is quick to answer."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import mptrain
from mptrain.recipe import file

ROOT = Path(mptrain.__file__).parent.parent
HEAVY = {"torch", "transformers", "nncf", "openvino", "datasets", "sklearn", "matplotlib", "accelerate", "pydantic"}


def test_the_public_names_are_exactly_all():
    assert dir(mptrain) == sorted(mptrain.__all__)
    for name in mptrain.__all__:
        assert callable(getattr(mptrain, name))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        mptrain.lod  # noqa: B018


def test_a_public_name_that_is_a_package_too_is_its_function():
    """Importing anything below it puts the package where the name was looked up."""
    both = {m.name for m in pkgutil.iter_modules(mptrain.__path__)} & set(mptrain.__all__)
    assert both == {"compress", "export", "verify"}
    for name in both:
        package = importlib.import_module(f"mptrain.{name}")
        assert getattr(mptrain, name) is package and inspect.unwrap(package).__name__ == name
        assert list(inspect.signature(package).parameters) == list(inspect.signature(package.__wrapped__).parameters)


def test_importing_the_face_and_its_packages_is_light():
    code = "import sys, mptrain; from mptrain import compress, export, verify; mptrain.export.base = 1\n"
    code += "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split("LOADED")[1].split()) & HEAVY


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


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, folder that the wheel was installed to). The wheel is made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(folder / "site"), str(wheel)], check=True, capture_output=True)
    return sdist, folder / "site"


def test_sdist_and_wheel_are_whole_and_have_the_version_of_pyproject(built, tmp_path):
    sdist, site = built
    names = {p.name for p in (site / "mptrain").rglob("*")}
    assert {p.name for p in file.bundled()} <= names
    assert {"accelerate-gloo-2cpu.yaml", "py.typed", "page.html.j2"} <= names
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {p.relative_to(ROOT).as_posix() for folder in ("docs", "recipes") for p in (ROOT / folder).rglob("*.*")}
    assert tracked | {"Makefile", "constraints.txt", "tests/conftest.py"} <= inside
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert sdist.name == f"mptrain-{version}.tar.gz"
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    code = "from mptrain.cli import main; main(['list']); main(['validate', 'quickstart']); main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(site), capture_output=True, text=True, check=True
    )
    assert "jpqd-bert" in done.stdout and "quickstart.yaml: valid" in done.stdout and str(site) in done.stdout
    assert done.stdout.endswith(f"mptrain {version}\n")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_an_installed_mptrain_runs_quickstart_in_an_empty_folder(built, tmp_path):
    _, site = built
    command = [sys.executable, str(site / "bin" / "mptrain"), "recipe", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(site), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    left = tmp_path / "runs" / "quickstart"
    assert json.loads((left / "report.json").read_text())["name"] == "quickstart"
    for name in ("report.html", "export/jpqd_int8/openvino_model.xml", "stages/jpqd/1-finetune/model/config.json"):
        assert (left / name).is_file(), name
