"""Every block of code on the pages does what a reader is told (see kit/pages.py)."""

from __future__ import annotations

import ast
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
from kit import pages
from kit.long import except_for

from mptrain import cli
from mptrain.core.disk import cache_folder
from mptrain.core.errors import RecipeError

BY_THEIR_OWN_TEST = {"docs/extend.md": "tests/contract/test_extend.py"}
"""pages that another test runs to the letter"""
NOT_RUN = {
    "docs/encryption.md": 2,
    "docs/migrate/apex.md": 1,
    "docs/migrate/ovtrainer.md": 1,
    "docs/tutorials/launch.md": 3,
}
"""how many blocks of a page say that they are not run, each with its reason"""
PAGES = [page for page in pages.pages() if page.relative_to(pages.ROOT).as_posix() not in BY_THEIR_OWN_TEST]
BLOCKS = [block for page in pages.pages() for block in pages.blocks(page)]
LONG = sorted({block.page for block in BLOCKS if block.mark == "long"})
SLOW = {"docs/export.md", "docs/python.md", "docs/trainer.md", "docs/migrate/ovtrainer.md"}
"""what stands on these pages has tests of its own"""


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    (cache_folder() / "kernels").mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(cache_folder() / "kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pages.furnish(tmp_path_factory.mktemp("furnished") / "here"), cache


@pytest.fixture
def here(furnished, tmp_path, monkeypatch):
    folder = shutil.copytree(furnished[0], tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPTRAIN_CACHE", str(furnished[1]))  # without packages, as on a new machine
    monkeypatch.syspath_prepend(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader sees them
        yield folder


def run_page(page: Path, folder: Path, wholly: bool = False) -> None:
    names = pages.namespace(folder)
    for block in pages.blocks(page):
        try:
            pages.run(block, names, wholly)
        except Exception as error:
            error.add_note(f"in the block at {block}")
            raise


@pytest.mark.parametrize(
    "page",
    except_for(PAGES, [page for page in PAGES if page.relative_to(pages.ROOT).as_posix() not in SLOW]),
    ids=lambda page: page.relative_to(pages.ROOT).as_posix(),
)
def test_what_the_page_says_can_be_done(page, here):
    run_page(page, here)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", LONG)
def test_what_takes_long_on_the_page(page, here):
    run_page(pages.ROOT / page, here, wholly=True)


def test_every_block_says_what_it_is():
    assert not [str(block) for block in BLOCKS if block.language not in pages.LANGUAGES]
    typed = re.compile(r"^(mptrain|make|pip|python|accelerate) ")
    hidden = [(b, line) for b in BLOCKS if b.language == "text" for line in b.text.splitlines() if typed.match(line)]
    for block, line in hidden:
        assert "[--" in line, f"{block}: a command is a block of sh"


def test_a_synopsis_has_the_options_of_its_command():
    found = [line for b in BLOCKS if b.language == "text" for line in b.text.splitlines() if "[--" in line]
    assert found
    for line in found:
        (command,) = [action for action in cli.parser()._actions if action.choices]
        options = command.choices[line.split()[1]]._option_string_actions
        assert set(re.findall(r"--[\w-]+", line)) <= set(options), line


def test_what_is_not_run_is_counted_and_says_why():
    marked = [block for block in BLOCKS if block.mark == "not run"]
    print(*(f"{block}: {block.reason}" for block in marked), sep="\n")
    assert Counter(block.page for block in marked) == NOT_RUN
    assert all(len(block.reason.split()) >= 3 for block in marked)
    for block in marked:
        if block.language == "python":
            ast.parse(block.text)


def test_pages_of_another_test_are_read_by_it():
    for page, test in BY_THEIR_OWN_TEST.items():
        assert Path(page).name in (pages.ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nmodel.no_such_thing\n```\n", AttributeError),
        ("```sh\nmptrain recipe no-such-recipe\n```\n", RecipeError),
        ("```sh\nmptrain export ./my-bert --no-such-option\n```\n", SystemExit),
        ("```sh\naccelerate launch --config_file configs/no.yaml -m mptrain recipe quickstart\n```\n", AssertionError),
        ("```sh\nmake no-such-rule\n```\n", AssertionError),
        ("```sh\ncurl https://example.org\n```\n", AssertionError),
        ("```yaml\nstages: [{id: a, tain: {epochs: 1}}]\n```\n", RecipeError),
    ],
)
def test_a_page_that_is_wrong_is_found(text, error, here, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", here)
    (here / "page.md").write_text(text)
    (here / "Makefile").write_text("setup:\n")
    (block,) = pages.blocks(here / "page.md")
    with pytest.raises(error):
        pages.run(block, {"model": object()})
