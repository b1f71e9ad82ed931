"""Imports go one way, as docs/architecture.md orders the packages; tests import no tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
FACES = ("__init__", "__main__")  # of mptrain itself: above all packages


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name that a file of `package` imports: module, or module.name. Lazy and type-only imports too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """File by file, as module names: which other files below root/package each imports."""
    files = {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        names = list(imported(ast.parse(path.read_text(encoding="utf-8")), inside))
        targets = {target if target in files else target.rpartition(".")[0] for target in names}
        found[name] = {target for target in targets if target in files and target != name}
    return found


def upward(graph: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports that go against the order, and files of packages that are not in it."""

    def level(module: str) -> int:
        parts = module.split(".")
        return len(order) if len(parts) == 1 or parts[1] in FACES else order.index(parts[1])

    unknown = sorted({m.split(".")[1] for m in graph if "." in m} - {*order, *FACES})
    if unknown:
        return [f"{package} is not in docs/architecture.md" for package in unknown]
    return sorted(f"{a} imports {b}" for a, targets in graph.items() for b in targets if level(a) < level(b))


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


GRAPH = imports(ROOT, "mptrain")


def test_no_import_goes_up():
    assert not upward(GRAPH, ORDER)


def test_the_order_names_every_package_once():
    packages = {m.split(".")[1] for m in GRAPH if "." in m} - set(FACES)
    assert sorted(ORDER) == sorted(packages)


def test_there_is_no_circle_between_files():
    assert not circle(GRAPH), "a circle between files"


def test_every_package_says_what_lives_there():
    doors = sorted((ROOT / "mptrain").rglob("__init__.py"))
    assert not [str(path) for path in doors if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_tests_import_no_tests_and_the_kit_says_what_it_holds():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = [part for name in imported(tree, "tests") for part in name.split(".")]
        assert not [n for n in names if n == "conftest" or (re.match(r"test_\w+$", n) and n != "test_all")], path
        if path.parent.name == "kit":
            assert ast.get_docstring(tree), path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/x.py": "def f():\n    from mptrain.b import y"}, ["mptrain.a.x imports mptrain.b.y"]),
        ({"a/x.py": "from ..b.y import Y"}, ["mptrain.a.x imports mptrain.b.y"]),
        ({"a/x.py": "import mptrain.b.y"}, ["mptrain.a.x imports mptrain.b.y"]),
        ({"a/x.py": "from mptrain import b"}, ["mptrain.a.x imports mptrain.b"]),
        ({"a/x.py": "from mptrain import LossScale"}, ["mptrain.a.x imports mptrain"]),
        ({"b/z.py": "from mptrain.a import x", "a/x.py": ""}, []),
        ({"c/x.py": ""}, ["c is not in docs/architecture.md"]),
    ],
)
def test_what_counts_as_upward(tmp_path, files, expected):
    for name, text in {"__init__.py": "", "a/__init__.py": "", "b/__init__.py": "", "b/y.py": "", **files}.items():
        path = tmp_path / "mptrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert upward(imports(tmp_path, "mptrain"), ["a", "b"]) == expected


def test_a_circle_of_lazy_imports_is_found(tmp_path):
    folder = tmp_path / "mptrain" / "a"
    folder.mkdir(parents=True)
    (folder / "x.py").write_text("from mptrain.a import y")
    (folder / "y.py").write_text("def f():\n    from mptrain.a.x import g")
    assert set(circle(imports(tmp_path, "mptrain"))) == {"mptrain.a.x", "mptrain.a.y"}


def test_help_imports_nothing_heavy():
    """torch takes seconds; a user who asks what there is, or mistypes an option, waits for none of it."""
    heavy = ("torch", "transformers", "numpy", "pandas", "rich", "pydantic", "yaml")
    code = f"import sys; from mptrain.cli import parser; parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
