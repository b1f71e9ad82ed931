"""Hooks of mkdocs: pages and results that lie beside docs/ are part of the site, and links to them stay inside it.

docs/index.md says `../benchmarks/README.md`, as the repository's readers need it; on the site the file lies at
benchmarks/README.md, beside index.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks/README.md"]
RESULTS = "benchmarks/results"
RECIPES = ROOT / "build" / "recipe-pages"  # by scripts/recipe_pages.py


def on_config(config: Any) -> Any:
    """The recipes' pages are in the navigation."""
    pages = [{path.stem: f"bundled/{path.name}"} for path in sorted(RECIPES.glob("*.md"))]
    config.nav.insert(3, {"Bundled recipes": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    results = [path for path in (ROOT / RESULTS).rglob("*") if path.suffix in (".md", ".png", ".json", ".jsonl")]
    for path in [*(ROOT / name for name in BESIDE), *sorted(results)]:
        name = path.relative_to(ROOT).as_posix()
        # the index of the site is docs/index.md
        source = "about.md" if name == "README.md" else name
        files.append(File.generated(config, source, abs_src_path=str(path)))
    for path in sorted(RECIPES.glob("*.md")):
        files.append(File.generated(config, f"bundled/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are from the page's place on the site."""
    if page.file.src_uri.startswith("bundled/"):
        return markdown  # written for that place
    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", lambda m: f"]({_link(m[1], page.file)}{m[2] or ''})", markdown)


def _link(target: str, file: File) -> str:
    if re.match(r"[a-z]+:", target):
        return target
    folder = Path(file.abs_src_path or "").parent
    inside = (folder / target).resolve().relative_to(ROOT).as_posix()
    place = "about.md" if inside == "README.md" else inside.removeprefix("docs/")
    up = "../" * file.src_uri.count("/")
    if (ROOT / inside).is_dir():
        return f"{up}benchmarks/README.md" if inside == f"{RESULTS}/runs" else place
    return up + place
