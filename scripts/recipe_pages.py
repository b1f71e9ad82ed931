"""A page of the site to each bundled recipe: what it does, the file, and the report of its run where one is kept.

python scripts/recipe_pages.py FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mptrain.recipe import file
from mptrain.report.render.files import read
from mptrain.report.render.markdown import markdown

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "benchmarks" / "results" / "runs"

NO_RUN = """No report of this recipe, as it is bundled, is kept in the repository: nothing on this page was measured.
`mptrain recipe` makes one."""


def page(recipe: Path) -> str:
    """In Markdown; the headings of the report go two levels down."""
    text = recipe.read_text(encoding="utf-8")
    read_recipe = file.read(str(recipe)).recipe
    described, code = read_recipe.description, " --allow-code" if read_recipe.model.own_code else ""
    found = [f"# {recipe.stem}", "", described[:1].upper() + described[1:].rstrip(".") + ".", ""]
    found += ["```sh", f"mptrain recipe {recipe.stem}{code}", f"mptrain copy {recipe.stem}     # to edit it", "```", ""]
    found += ["```yaml", text.rstrip(), "```", "", "## Its report", ""]
    run = RUNS / f"{recipe.stem}.json"
    if not run.is_file():
        return "\n".join([*found, NO_RUN, ""])
    report = re.sub(r"^(#+) ", r"\1## ", markdown(read(run)), flags=re.MULTILINE)
    kept = f"[benchmarks/results/runs/{run.name}](../benchmarks/results/runs/{run.name})"
    return "\n".join([*found, f"As `mptrain report` draws it from {kept}:", "", report])


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in file.bundled():
        (folder / f"{recipe.stem}.md").write_text(page(recipe), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
