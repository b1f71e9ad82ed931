"""Run the notebooks of docs/notebooks and keep what their cells show.

    python -m scripts.notebooks            writes the outputs into the notebooks
    python -m scripts.notebooks NAME.ipynb

A light runner of our own, without a kernel: the cells of a notebook run in one namespace, in a folder that is thrown
away, and the value of a cell's last expression is kept as text, and as HTML where it has `_repr_html_`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of its code cells. An error of a cell is raised, with the cell's number."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            count += 1
            try:
                cell["outputs"] = _outputs("".join(cell["source"]), names, f"{path.name}, cell {count}", count)
            except Exception as error:
                error.add_note(f"in cell {count} of {path.name}")
                raise
            cell["execution_count"] = count
    return notebook


def _outputs(source: str, names: dict[str, Any], where: str, count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    found: list[dict[str, Any]] = []
    if text := printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = [value._repr_html_()]
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    paths = [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        path.write_text(json.dumps(run(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
