"""Whether it helps to let whole attentions and FFNs go (`prune: {method: curvature, drop: true}`): pruned at once,
without training, to the same budgets with and without it.

    python -m benchmarks.jpqd.drop --json benchmarks/results/drop.json --dense FOLDER

The dense MiniLM of the film reviews (2 epochs, trained here unless --dense names it) and its curvature on 1,024
training reviews are the same for all rows; a row is a budget, spent on heads and channels alone (`whole` False) or
with whole blocks among what may go. Budgets: parameters of the encoder, and latency of the whole fp32 model in
OpenVINO, batch 1, 128 tokens, one thread, as `keep.latency` holds it. Scored are the torch models on the validation and
the test split, which pruning does not see; `ahead` is the accuracy with dropping less that without, paired. `share` is
the time of the exported fp32 model against the dense one's, in alternating rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.jpqd.curve import add_dense, dense_of
from benchmarks.jpqd.one_shot import SAMPLES, like, scored
from mptrain.compress import runtime
from mptrain.compress.base import Tools
from mptrain.compress.prune import measured
from mptrain.compress.prune.curvature import CurvaturePruner
from mptrain.compress.structure import costs
from mptrain.compress.structure.budget import Budget, Widths
from mptrain.compress.structure.find import droppable, find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.host import host
from mptrain.data.load import Task
from mptrain.export.target import opened
from mptrain.flow.identity import versions
from mptrain.measure.intervals import interval, paired_difference
from mptrain.models import artifact
from mptrain.recipe import Curvature, Keep
from mptrain.recipe.target import stand_in

PARAMETERS = (0.5, 0.33, 0.25, 0.15, 0.1, 0.05)
LATENCIES = (0.5, 0.33, 0.25, 0.2, 0.15)
FLOORS = {"min_heads": 1, "min_ffn": 16, "round_ffn": 16}
SPLITS = ("validation", "test")
ROUNDS = 31


class Bench:
    """One dense model, looked at once."""

    def __init__(self, dense: nn.Module, task: Task) -> None:
        self.dense, self.task = dense, task
        self.structure = find_structure(dense)
        self.drop = frozenset(droppable(dense, self.structure)[0])
        self.tools = Tools(example=lambda: task.example(1, 128), runtime=partial(opened, stand_in(None, 1)))
        config = Curvature.model_validate({"method": "curvature", "keep": {"encoder_params": 0.5}, **FLOORS})
        self.pruner = CurvaturePruner(config, structure=self.structure, phase_steps=0, steps_per_epoch=1)
        self.pruner.prepare(dense)
        self.pruner.look(dense, task.calibration(SAMPLES.samples, SAMPLES.batch_size))
        self.whole = measured.measure(
            dense, self.structure, self.tools.example(), self.tools.runtime(), budget="latency", extents=128,
            widths=Widths(*FLOORS.values()),
        )  # fmt: skip
        self.scores = {split: scored(dense, task, split) for split in SPLITS}

    def pruned(self, keep: dict[str, float], whole: bool) -> tuple[nn.Module, dict[str, Any]]:
        """whole: whether blocks may be left out."""
        drop = self.drop if whole else frozenset[str]()
        self.pruner.budget = Budget(
            self.structure, Keep.model_validate(keep), length=128, whole=self.whole, drop=drop, **FLOORS
        )
        if "latency" in keep:
            measured.hold(self.pruner, self.dense, self.tools, "latency")
        else:
            self.pruner.settle(self.pruner.resolve())
        kept, model = self.pruner.kept(), copy.deepcopy(self.dense)
        self.pruner.refit(model, kept)
        counts = {block.name: kept.count(block) for block in self.structure}
        params = sum(costs.params(block, counts[block.name]) for block in self.structure)
        total = sum(costs.params(block, block.units) for block in self.structure)
        facts = {"loss": self.pruner.facts()["loss"], "dropped": self.pruner.facts()["dropped"]}
        return shrink(model, self.structure, kept).eval(), facts | {"encoder": params / total, "counts": counts}

    def share(self, model: nn.Module) -> float:
        example, target = self.tools.example(), self.tools.runtime()
        with (
            closing(target.compiled(self.dense, example)) as dense,
            closing(target.compiled(model, example)) as one,
        ):
            return runtime.share(one, dense, ROUNDS, "timing")

    def row(self, budget: str, asked: float, whole: bool, without: dict[str, Any] | None) -> dict[str, Any]:
        model, facts = self.pruned({budget: asked}, whole)
        found = {"name": f"{budget}/{asked:g}/{'drop' if whole else 'keep'}", "budget": budget, "asked": asked}
        found |= {"whole": whole, **facts, "share": self.share(model)}
        for split in SPLITS:
            score = scored(model, self.task, split)
            change = paired_difference(score, self.scores[split])
            low, high = interval(score)
            found[split] = {
                "accuracy": score.value, "low": low, "high": high,
                "against_dense": [change.value, change.low, change.high],
                "correct": "".join(str(int(x)) for x in score.stats[:, 0]),
            }  # fmt: skip
            if without is not None:
                ahead = paired_difference(score, like(score, without[split]["correct"]))
                found[split]["ahead"] = [ahead.value, ahead.low, ahead.high]
        return found


def table(result: dict[str, Any]) -> str:
    dense = result["dense"]
    lines = [
        "Dense: " + ", ".join(f"{100 * dense[s]['accuracy']:.1f}% on {dense[s]['n']:,} {s} reviews" for s in SPLITS)
        + ". Pruned at once by curvature, without training; paired intervals, 95%; time of the fp32 file in"
        " OpenVINO.",
        "",
        "| budget | whole blocks | encoder kept | of the time | predicted loss | left out | validation | ahead by |"
        " test | ahead by |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for r, before in zip(result["rows"], [None, *result["rows"]]):
        cells = [f"{r['budget']} {r['asked']:g}", "may go" if r["whole"] else "", f"{100 * r['encoder']:.1f}%"]
        cells += [f"{r['share']:.3f}", f"{r['loss']:.4g}", ", ".join(map(short, r["dropped"]))]
        for split in SPLITS:
            ahead = [100 * x for x in r[split].get("ahead", [])]
            cells.append(f"{100 * r[split]['accuracy']:.1f}%")
            cells.append(f"{ahead[0]:+.1f} ({ahead[1]:+.1f} … {ahead[2]:+.1f})" if ahead else "")
            cells[-1] = "the same model" if before is not None and same(r, before) else cells[-1]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def same(row: dict[str, Any], without: dict[str, Any]) -> bool:
    """Whether a row with whole blocks among what may go keeps the same units as the one before it, without."""
    return row["whole"] and row["counts"] == without["counts"]


def short(block: str) -> str:
    """bert.encoder.layer.3.attention is "attention 3"."""
    *_, layer, kind = block.split(".")
    return f"{kind} {layer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    add_dense(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, task = dense_of(options)
    bench = Bench(artifact.load(folder), task)
    result: dict[str, Any] = {"host": host(), "versions": versions(), "calibration": SAMPLES.samples, "rounds": ROUNDS}
    result["dense"] = {split: {"accuracy": score.value, "n": score.n} for split, score in bench.scores.items()}
    result["rows"] = []
    for budget, shares in (("encoder_params", PARAMETERS), ("latency", LATENCIES)):
        for asked in shares:
            without = bench.row(budget, asked, False, None)
            for found in (without, bench.row(budget, asked, True, without)):
                brief = {k: v for k, v in found.items() if k not in ("counts", *SPLITS)}
                scores = {s: [found[s]["accuracy"], found[s].get("ahead")] for s in SPLITS}
                print(json.dumps(brief | scores), flush=True)
                result["rows"].append(found)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table(result) + "\n")


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    main()
