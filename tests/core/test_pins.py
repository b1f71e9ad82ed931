"""What we use of other packages' private parts is in core/pins.py, and is there in the versions that are installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import mptrain
from mptrain.core import pins
from mptrain.core.pins import PINS, Pin
from mptrain.recipe import EXPORTS

ROOT = Path(mptrain.__file__).parent
NAMES = {(package, name): file for package, pin in PINS.items() for name, file in pin.private.items()}
# of Python's own, or asked for with a default where it may be missing
OURS = {"_fields", "_is_accelerate_prepared"}


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda value: value)
def test_a_private_name_is_there(package, name):
    if pins._installed(package) is None:  # in a lane of scripts/lanes.py; `make setup` installs all
        pytest.skip(f"{package} is not installed")
    module, _, path = name.partition(":")
    path, _, attribute = path.partition("@")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coreai-torch takes 2.13.0+cpu for newer than 2.13.0
        found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")
    if attribute:
        assert attribute in inspect.getsource(inspect.getmodule(found))
    last = attribute or path.rpartition(".")[2]
    assert last in (ROOT / NAMES[package, name]).read_text(encoding="utf-8"), "the file does not use it"


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used(tree: ast.Module) -> Iterator[str]:
    """Private names that a file takes of objects but its own self: "name", or "module:name" of an import."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=attribute) if private(attribute):
                yield attribute
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                if private(name):
                    yield name
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("mptrain"):
                inner = any(module == m or module.startswith(f"{m}.") for pin in PINS.values() for m in pin.inner)
                for alias in names:
                    if inner or private(alias.name) or any(map(private, module.split("."))):
                        yield f"{module}:{alias.name}"


def defined(trees: dict[Path, ast.Module]) -> set[str]:
    """Names that our own code defines, which are private to us."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                    found.add(name)
    return found


def test_no_private_name_is_used_that_is_not_listed():
    trees = sources()
    names = [name for _, name in NAMES]
    listed = {part for name in names for part in name.replace("@", ".").replace(":", ".").split(".")}
    dotted = {name.replace(":", ".").replace("@", ".") for name in names}
    ours = defined(trees) | OURS
    missing = []
    for path, tree in trees.items():
        for name in used(tree):
            plain = name.replace(":", ".")
            known = (
                any(entry == plain or entry.startswith(f"{plain}.") for entry in dotted)
                if ":" in name
                else name in listed | ours
            )
            if not known:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_a_version_outside_is_named_with_the_way_back(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"nncf": "3.5.1", "torch": "2.13.0+cpu", "requests": "2"}.__getitem__)
    (said,) = pins.untested(["nncf", "torch", "requests"])
    assert "nncf 3.5.1" in said and "tested with 3.4" in said and "pip install 'nncf==3.4.*'" in said


def test_a_version_whose_numbers_only_begin_alike_is_outside(monkeypatch):
    monkeypatch.setitem(PINS, "some", Pin(tested=("2.1",), private={}))
    for version, count in (("2.1", 0), ("2.1.7", 0), ("2.1+cpu", 0), ("2.1rc1", 0), ("2.10", 1), ("2.10.1", 1)):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert len(pins.untested(["some"])) == count, version


def test_the_formats_take_what_was_tested_and_the_constraints_are_it():
    from packaging.specifiers import SpecifierSet

    constraints = dict(
        line.split("==") for line in (ROOT.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for package, pin in PINS.items():
        assert pins.is_tested(constraints[package], pin), package
    for spec in EXPORTS.values():
        for package in spec.packages:
            version = constraints[package.name]
            assert SpecifierSet(package.tested, prereleases=True).contains(version), package


def test_a_version_that_was_not_tested_is_said_once_before_work(monkeypatch, caplog):
    from transformers import TrainingArguments

    monkeypatch.setattr(pins, "_said", set())
    monkeypatch.setattr(pins, "_installed", lambda name: "99.1")
    for _ in range(2):
        with pytest.raises(RuntimeError):  # no model: said before anything else is looked at
            mptrain.Trainer(None, TrainingArguments("out", use_cpu=True, report_to=[]))
    said = [record.getMessage() for record in caplog.records if record.name == pins.log.name]
    assert [text.partition(" is installed")[0] for text in said] == ["torch 99.1", "transformers 99.1"]
