"""python -m benchmarks.soak --json benchmarks/results/soak-DATE.json: continue until all cases are done.

Runs are killed and continued, recipes are broken and given to `validate` and `--dry-run`, files are damaged and read
(see kills.py, recipes.py and inputs.py).
Case n is the same everywhere, and the file says how many are done, so a command that was stopped can be repeated.
Status 1 when a case ended in a traceback, a crash, a time limit, a failure without a word, or was read as something
else although a checksum or a size tells. `PYTHONPATH=tests`, for the tiny models.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.soak import bases, cases, inputs, kills, recipes
from benchmarks.soak.cases import Outcome
from mptrain.core.disk import read_json, write_json
from mptrain.core.progress import progress
from mptrain.recipe import file

BAD = ("traceback", "crash", "timeout", "silent")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--validate", type=int, default=10_000, metavar="N", help="broken recipes (default 10000)")
    parser.add_argument("--dry-run", type=int, default=1_000, metavar="N", help="broken recipes (default 1000)")
    parser.add_argument("--damaged", type=int, default=20, metavar="N", help="damaged files of each kind (default 20)")
    parser.add_argument("--killed", type=int, default=100, metavar="N", help="runs that are killed (default 100)")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state: dict[str, Any] = read_json(options.json) if options.json.is_file() else {"parts": {}}
    state |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        soak(state, options.json, "killed", options.killed, kills.Kills(folder / "killed").case, every=1)
        bundled = [path.read_text(encoding="utf-8") for path in file.bundled()]
        tiny = bases.make(folder / "bases")
        written = folder / "recipe.yaml"

        def recipe(
            number: int, arguments: list[str], make: Callable[[int, list[str]], str], texts: list[str]
        ) -> Outcome:
            written.write_text(make(number, texts), encoding="utf-8", errors="surrogatepass")
            return cases.command([*arguments[:1], str(written), *arguments[1:]])

        soak(
            state, options.json, "validate", options.validate, lambda n: recipe(n, ["validate"], recipes.case, bundled)
        )
        mixed = lambda n, texts: (recipes.mild if n % 2 else recipes.case)(n, texts)  # noqa: E731
        dry = lambda n: recipe(n, ["recipe", "--dry-run"], mixed, tiny)  # noqa: E731
        soak(state, options.json, "dry-run", options.dry_run, dry)
        for kind in inputs.kinds(folder / "whole") if options.damaged else []:
            whole = inputs.undamaged(kind, folder / "scratch")
            if whole.kind != "read":  # or every refusal below would mean nothing
                raise SystemExit(f"{kind.name}: the undamaged file is not read: {whole}")
            soak(
                state,
                options.json,
                f"damaged {kind.name}",
                options.damaged,
                lambda n, kind=kind: inputs.run(kind, n, folder / "scratch"),
            )
    bad = {name: part["bad"] for name, part in state["parts"].items() if part["bad"]}
    for name, found in bad.items():
        for one in found:
            print(f"{name} {one['case']}: {one['kind']} {one['at']} {one['said']}")
    return 1 if bad else 0


def soak(
    state: dict[str, Any], path: Path, name: str, count: int, case: Callable[[int], Outcome], every: int = 25
) -> None:
    """Do the cases of a part that are not done, keeping the counts."""
    part = state["parts"].setdefault(name, {"done": 0, "outcomes": {}, "bad": []})
    with progress(name, count, done=part["done"]) as bar:
        while part["done"] < count:
            number = part["done"]
            found = case(number)
            part["outcomes"][found.kind] = part["outcomes"].get(found.kind, 0) + 1
            if found.kind in BAD:
                part["bad"].append({"case": number, "kind": found.kind, "at": found.at, "said": found.said})
            part["done"] += 1
            if part["done"] % every == 0 or part["done"] == count:
                write_json(path, state)
            bar.update()


if __name__ == "__main__":
    sys.exit(main())
