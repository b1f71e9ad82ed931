"""Whether `prune.keep.latency` keeps its word: the share of latency asked for against that of the exported model.

    .venv/bin/python -m benchmarks.jpqd.latency_budget --json benchmarks/results/latency_budget.json

The packaged MiniLM BERT is pruned by curvature with `drop: true`, as a stage of a recipe does it, for float and for
int8 exports (inputs are made up: which units go does not matter to the time): the table of block times is measured
once per precision, the choice of every budget is exported, timed and corrected by the method itself. What it left is
then exported anew and timed against the uncut model, in rounds that alternate which goes first, at batch 1, length 128
and one thread. `ratio` is the median over the rounds of what is left of the whole model's latency; the bar is 5% of
what was asked for.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.kit.paired import markdown, write
from mptrain.compress.base import Tools
from mptrain.compress.methods import method_class
from mptrain.compress.quantize import quantizers
from mptrain.core.stream import calls_to_warm
from mptrain.data.sources import packaged
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.export.target import opened
from mptrain.recipe import Curvature, Keep, Ptq
from mptrain.recipe.target import stand_in

SHARES = (0.75, 0.5, 0.33, 0.25, 0.15)
QUANTIZE = {"fp32": None, "int8": Ptq(mode="ptq")}
LENGTH = 128
BAR = 0.05


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(packaged.fetch("packaged:minilm-l6"), num_labels=2).eval()


def example(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 1000, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pruned(share: float, precision: str, kept: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what the method says of its budget. kept: what was measured of the blocks."""

    def once(name: str, make: Callable[[], Any]) -> Any:
        if name != "latency":  # of this budget alone
            return make()
        if name not in kept:
            kept[name] = make()
        return kept[name]

    config = Curvature(method="curvature", keep=Keep(latency=share), drop=True)
    method = method_class(config)(config)
    tools = Tools(
        inputs=lambda: [example(8)],
        example=lambda: example(1),
        runtime=partial(opened, stand_in(QUANTIZE[precision], 1)),
        length=LENGTH,
        once=once,
    )
    return method.finalize(method.prepare(fresh(), tools), tools), method.facts()["budget"]


def exported(model: nn.Module, precision: Any, folder: Path) -> CompiledIr:
    config = QUANTIZE[precision]
    embeddings = "fp32"
    if config is not None:
        model, embeddings = quantizers.quantize(copy.deepcopy(model), config, [example(4)]), config.embeddings
    export_openvino(model, example(2), folder, precision=precision, embeddings=embeddings)
    return CompiledIr(folder / "openvino_model.xml", threads=1)


def timed(one: CompiledIr, whole: CompiledIr, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of calls, each one of a stream of calls."""
    batch, found = example(1), ([], [])  # type: ignore[var-annotated]
    untimed = {id(runner): calls_to_warm(min(_timed(runner, batch) for _ in range(3))) for runner in (one, whole)}
    for number in range(rounds):
        pair = [(one, found[0]), (whole, found[1])]
        for runner, times in pair if number % 2 else reversed(pair):
            for _ in range(untimed[id(runner)]):
                runner(batch)
            times.append(_timed(runner, batch))
    return found


def _timed(runner: CompiledIr, batch: dict[str, torch.Tensor]) -> float:
    begun = time.process_time()
    runner(batch)
    return time.process_time() - begun


def row(share: float, precision: str, kept: dict[str, Any], whole: CompiledIr, rounds: int, folder: Path) -> dict:
    begun = time.monotonic()
    model, facts = pruned(share, precision, kept)
    took = time.monotonic() - begun
    with closing(exported(model, precision, folder / f"{precision}-{share}")) as runner:
        mine, its = timed(runner, whole, rounds)
    ratio = statistics.median(a / b for a, b in zip(mine, its, strict=True))
    first = facts["measured"] if facts["corrected"] is None else facts["corrected"]
    return {
        "name": f"{precision}, {share:g}",
        "precision": precision,
        "asked": share,
        "predicted": facts["predicted"],
        "first": first,
        "held": facts["measured"],
        "ratio": ratio,
        "off": ratio / share - 1.0,
        "within": "yes" if abs(ratio / share - 1.0) <= BAR else "no",
        "ms": 1e3 * statistics.median(mine),
        "whole_ms": 1e3 * statistics.median(its),
        "rounds": rounds,
        "wall_s": round(took, 1),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in QUANTIZE:
            kept: dict[str, Any] = {}
            with closing(exported(fresh(), precision, Path(folder, precision))) as whole:
                for share in SHARES:
                    rows.append(row(share, precision, kept, whole, options.rounds, Path(folder)))
                    print(json.dumps(rows[-1]), flush=True)
    bars = []
    for precision in QUANTIZE:
        worst = max(abs(r["off"]) for r in rows if r["precision"] == precision)
        bars.append((f"{precision}: within 5% of what was asked for: at most {100 * worst:.1f}% away", worst <= BAR))
    write(options.json, rows, bars, table(rows), plotted=None, clock="CPU time of the process")


def table(rows: list[dict[str, Any]]) -> str:
    columns = {"name": "asked for", "predicted": "predicted", "first": "first choice", "held": "after correction"}
    columns |= {"ratio": "measured", "percent": "off by", "within": "within 5%", "ms": "ms", "whole_ms": "ms uncut"}
    shares = ("predicted", "first", "held", "ratio")
    told = [{**r, **{n: f"{r[n]:.3f}" for n in shares}, "percent": f"{100 * r['off']:+.1f}%"} for r in rows]
    return markdown(told, columns)


if __name__ == "__main__":
    main()
