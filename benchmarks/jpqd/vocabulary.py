"""How many tokens a cut vocabulary should keep: what is lost at once, without training, by those that go.

    python -m benchmarks.jpqd.vocabulary --json benchmarks/results/vocabulary.json

The dense MiniLM of the film reviews (2 epochs; one to a seed, trained here unless --dense names them) with fewer
tokens: fewer than training uses, those in use, and beyond them those that come first in the tokenizer. A row has the
share of test reviews that are spelled otherwise, and the accuracy of the torch model on the test split, which chose
nothing, less that of the dense model: mean of the seeds, paired over the reviews, [value, low, high].
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.jpqd.curve import dense_run, recipe
from benchmarks.jpqd.embedding_rank import percent
from benchmarks.jpqd.one_shot import scored
from mptrain.compress.vocabulary import cut as tables
from mptrain.compress.vocabulary import tokenizer as tokenizers
from mptrain.core.disk import write_json
from mptrain.core.host import host
from mptrain.data.load import Task, load_data
from mptrain.data.tasks.metrics import Score
from mptrain.flow import vocabulary
from mptrain.flow.identity import versions
from mptrain.measure.intervals import paired_difference
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import file as recipe_file

KEPT: tuple[Literal["used"] | int, ...] = (12000, "used", 16000, 20000, 24000)
SEEDS = (42, 43, 44)
Row = dict[str, Any]


def mean(scores: list[Score]) -> Score:
    first = scores[0]
    stats = np.mean([score.stats for score in scores], axis=0)
    return Score(first.name, stats, first.of, first.unit, first.higher_is_better)


def row(keep: Literal["used"] | int, dense: list[nn.Module], whole: Score, task: Task, load: Any) -> Row:
    """whole: of the dense models. load: the task with another tokenizer."""
    kept = tokenizers.choose(task.processor, vocabulary.counts(task), keep)
    cut = load(tokenizers.cut(task.processor, kept))
    example = {k: v for k, v in task.collate([task.train[0]]).items() if k != "labels"}
    fewer = [scored(tables.cut(copy.deepcopy(model), kept, example), cut, "test") for model in dense]
    change = paired_difference(mean(fewer), whole)
    found: Row = {"name": "used" if keep == "used" else f"{keep:,}", "tokens": len(kept)}
    found["spelled_otherwise"] = vocabulary.changed(task, cut, "test")
    return found | {"against_dense": [change.value, change.low, change.high], "n": whole.n, "seeds": len(dense)}


def table(result: Row) -> str:
    lines = ["| tokens | spelled otherwise | against dense |", "|---|--:|---|"]
    for r in result["rows"]:
        change = percent(r["against_dense"])
        lines.append(f"| {r['tokens']:,} | {100 * r['spelled_otherwise']:.1f}% | {change} |")
    first = result["rows"][0]
    return "\n".join([*lines, "", f"n = {first['n']:,}, {first['seeds']} seeds; {result['host']['cpu']}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dense", type=Path, nargs=len(SEEDS), help="folders of the trained dense models, by seed")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-vocabulary"), help="folder for the dense runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = options.dense or [dense_run(str(s), None, options.work) / "stages/dense/0-train/model" for s in SEEDS]
    spec = recipe_file.validate(recipe("dense/-/100/0", None, options.work), "dense")

    def load(processor: Any) -> Task:
        return load_data(spec.data, spec.model.task, processor, seed=spec.seed)

    task = load(load_processor(spec.model))
    result: Row = {"host": host(), "versions": versions(), "whole": len(task.processor), "rows": []}
    models = [artifact.load(folder) for folder in dense]
    whole = mean([scored(model, task, "test") for model in models])
    for keep in KEPT:
        result["rows"].append(row(keep, models, whole, task, load))
        print(result["rows"][-1], flush=True)
    write_json(options.json, result)
    options.json.with_suffix(".md").write_text(table(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    sys.exit(main())
