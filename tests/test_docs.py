"""The pages: made ones are fresh, links lead somewhere, and the README is short enough to be read."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc, getsource, isclass, isfunction, signature, unwrap
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

import mptrain
from mptrain import cli
from mptrain.core import errors
from mptrain.recipe import TASKS, file
from scripts import recipe_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("script", ["recipe_docs", "results"])
def test_made_pages_are_fresh(script):
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_number_that_was_changed_by_hand_is_found(tmp_path, monkeypatch):
    from scripts.results import __main__ as results

    text = results.README.read_text(encoding="utf-8")
    wrong = tmp_path / "README.md"
    wrong.write_text(text.replace("82.3%", "92.3%"), encoding="utf-8")
    monkeypatch.setattr(results, "README", wrong)
    assert results.readme() == text


def test_every_result_is_drawn():
    """Or is a log of one day."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    kept = ROOT / "benchmarks" / "results"
    for path in [*kept.glob("*.json*"), *kept.glob("runs/*.json")]:
        if not re.search(r"-\d{4}-\d\d-\d\d$", path.stem):
            assert path.name in page or f"{path.stem}.md" in page, path.name


def test_the_readme_is_short_and_begins_with_what_a_newcomer_does():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert next(i for i, line in enumerate(lines) if line.startswith("make demo")) < 20
    assert lines[next(i for i, line in enumerate(lines) if line.startswith("make demo")) + 1].startswith("make test")


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page != "index.md" and f"({page})" not in index]


def test_every_page_is_on_the_site():
    nav = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f"'{page}'" not in nav]


API = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", API)
def test_what_the_api_page_shows_says_what_its_arguments_are(path):
    try:
        shown = import_module(path)
        members = [value for value in vars(shown).values() if isfunction(value) and value.__module__ == path]
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        members = [getattr(import_module(module), name)]
    for member in members:
        text = getdoc(member)
        assert text, member
        if isclass(member):
            continue
        missing = [name for name in signature(member).parameters if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{member.__qualname__}: {missing}"


@pytest.mark.parametrize("name", mptrain.__all__)
def test_public_names_say_shapes_units_errors_and_source(name):
    shown = unwrap(getattr(mptrain, name))
    text = (getdoc(shown) or "") + (getdoc(shown.__init__) or "" if isclass(shown) else "")
    missing = [word for word in ("Shapes and dtypes: ", "Units: ", "Raises ", "Source: ") if word not in text]
    assert not missing
    members = [value for value in vars(shown).values() if isclass(shown) and isfunction(value)] or [shown]
    for member in members:
        if member.__name__.startswith("_") or not (member.__module__ or "").startswith("mptrain"):
            continue
        own = text if member is shown else getdoc(member) or ""
        raised = {
            node.exc.func.id
            for node in ast.walk(ast.parse(dedent(getsource(member))))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        assert not [kind for kind in raised if kind not in own], f"{name}.{member.__name__}"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for block in [*blocks(page, ""), *blocks(page, "sh")]
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"\s*mptrain [a-z]", line)
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_pages_are_commands(command):
    usage = re.search(r"…|\[--", command)  # a synopsis, not to be typed
    words = shlex.split(command, comments=True)[1:]
    if not usage:
        cli.parser().parse_args(words)
    else:
        assert words[0] in cli.COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_the_pages_compiles_and_imports_what_there_is(page):
    own = re.findall(r"^`(\w+)\.py`:$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module not in own:
                module = import_module(str(node.module))
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert not [name for name in missing if find_spec(f"{node.module}.{name}") is None]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mptrain":
                assert hasattr(mptrain, node.attr) or find_spec(f"mptrain.{node.attr}"), node.attr


@pytest.mark.parametrize("path", file.bundled(), ids=lambda path: path.stem)
def test_every_recipe_has_a_page_with_the_report_of_its_run(path):
    text = recipe_pages.page(path)
    assert path.read_text(encoding="utf-8").rstrip() in text and f"mptrain recipe {path.stem}" in text
    kept = (ROOT / "benchmarks/results/runs" / f"{path.stem}.json").is_file()
    assert ("#### Verdict" in text) is kept


def test_every_bundled_recipe_is_on_the_page_that_chooses_one():
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/running.md"))
    assert not [path.stem for path in file.bundled() if f"`{path.stem}`" not in pages]


def test_every_task_and_its_data_are_described():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert not [name for name in TASKS if f"| `{name}` |" not in text]


def test_paths_that_the_architecture_page_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*/?(?:\.py)?)`", text))
    files = {name for name in names if name.endswith(".py") or "/" in name}
    places = [ROOT / "mptrain", ROOT, ROOT / "mptrain/precision", ROOT / "mptrain/compress/structure"]
    missing = [n for n in files if not any((p / n).exists() or (p / f"{n}.py").exists() for p in places)]
    assert not [name for name in missing if name != "tests/long/"]


def test_every_kind_of_error_has_a_section():
    kinds = [c for c in vars(errors).values() if isclass(c) and issubclass(c, errors.MptrainError)]
    found = anchors(ROOT / "docs" / "troubleshooting.md")
    assert len(kinds) > 9 and not [c.__name__ for c in kinds if c.__name__.lower() not in found]


class Own(errors.DataError):
    """Of an extension."""


@pytest.mark.parametrize(
    ("error", "section"),
    [
        (errors.MptrainError("x"), "mptrainerror"),
        (errors.RecipeError("x"), "recipeerror"),
        (Own("x"), "dataerror"),
        (MemoryError(), "what-is-not-an-error-of-ours"),
    ],
)
def test_the_command_line_names_the_section(error, section, monkeypatch, capsys):
    def refuse(options):
        raise error

    monkeypatch.setattr("mptrain.commands.list.run", refuse)
    assert cli.main(["list"]) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1] == f"mptrain: see docs/troubleshooting.md#{section}"
    assert section in anchors(ROOT / "docs" / "troubleshooting.md")


def test_messages_that_the_page_quotes_are_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "mptrain").rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)  # literals that stand one after another
    quoted = [part for message in re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE) for part in message.split("…")]
    parts = [part.strip() for part in quoted if part.strip()]
    assert len(parts) > 30 and not [part for part in parts if part not in source]
