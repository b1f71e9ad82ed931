"""The pages, written or compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from scripts.results import exports, jpqd_page, precision, pruning, quantized, runs
from scripts.results.drawn import ROOT

PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- made by scripts/results -->", "<!-- end -->"


SECTIONS: list[Callable[[], list[str]]] = [
    runs.runs,
    pruning.joint,
    pruning.order,
    pruning.one_shot,
    pruning.recovered,
    pruning.dropped,
    pruning.vocabulary,
    pruning.embedding_rank,
    pruning.seeds,
    pruning.distilled,
    pruning.seed_jpqd,
    pruning.latency_budget,
    pruning.family,
    lambda: ["## Training in half precision", ""],
    precision.step,
    precision.half_model,
    precision.equivalence,
    precision.eight_bits,
    precision.overhead,
    lambda: ["## Fewer bits to a weight", ""],
    exports.kmeans,
    exports.opt,
    exports.language_model,
    quantized.pruned_language_model,
    quantized.adapters,
    quantized.sentence_vectors,
    quantized.two_runtimes,
    exports.exports,
    exports.reach,
    exports.heads,
    exports.onnx_casts,
    exports.recurrence,
    exports.scopes,
    exports.encrypted,
    exports.choices,
]


def page() -> str:
    text = [
        "# Results",
        "",
        "Made by `python -m scripts.results` from `benchmarks/results`; do not edit. Which command measures what:"
        " [benchmarks/README.md](../benchmarks/README.md). What the numbers do not say: [limits.md](limits.md).",
        "",
    ]
    return "\n".join([*text, *(line for section in SECTIONS for line in drawn(section))]).rstrip() + "\n"


def drawn(section: Callable[[], list[str]]) -> list[str]:
    """The lines of a section; none, and said so, where its benchmark has not been run yet."""
    try:
        return section()
    except FileNotFoundError as error:
        print(f"{Path(error.filename).name} has not been made: its section is left out", file=sys.stderr)
        return []


def readme() -> str:
    """README.md with its table made anew."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return "\n".join([before + BEGIN, *runs.readme_table(), END + rest.split(END)[1]])


def main() -> int:
    wanted = {PAGE: page(), README: readme(), jpqd_page.PAGE: jpqd_page.page()}
    if "--check" in sys.argv:
        stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
        print("".join(f"{name} is stale: run `python -m scripts.results`\n" for name in stale), end="", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
