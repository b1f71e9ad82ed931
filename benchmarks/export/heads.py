"""Time of a sampled token: the choice of 20 in the graph, against all logits handed to numpy.

    python -m benchmarks.export.heads --json benchmarks/results/heads.json

GPT-2 (12 layers, 124M, vocabulary 50,257) with random weights as mptrain exports it to OpenVINO, with its key-value
cache, in float32 and with weights in int8; one thread. Each way continues the same prompts of 32 tokens by 12 tokens,
drawn by the same random numbers among the 20 likeliest, and the tokens must be the same. A row is a way at a batch:

    sort        the softmax of all logits, sorted, in numpy: as sampling is mostly written
    partition   the 20 highest by numpy's argpartition, and the softmax of these: the best that numpy has
    head        heads: [{topk: 20}, {softmax: true}] in the graph; numpy draws from 20 numbers

token_ms is the median of rounds, in turns, of the CPU time of a token; `less` the share that `head` saves of the way.
prompt rows: the first token after a prompt of 64 tokens, where without heads all 64 rows of logits are computed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t

from benchmarks.kit.paired import markdown, write
from mptrain.compress.weights import weight_only
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.openvino.runner import CachedIr
from mptrain.export.openvino.write import export_openvino
from mptrain.export.torch.heads import signature_with
from mptrain.recipe import TASKS, WeightOnly
from mptrain.recipe.exports.heads import Head

TOP, PROMPT, NEW, LONG = 20, 32, 12, 64
BAR = 0.25
Logits = dict[str, np.ndarray]
SIGNATURE = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("attention_mask", (BATCH, "tokens"), "int64")),
    (Port("logits", (BATCH, "tokens", "vocabulary")),),
)


def by_sorting(outputs: Logits, draws: np.ndarray) -> np.ndarray:
    logits = outputs["logits"][:, -1]
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    best = np.argsort(-odds, -1)[:, :TOP]
    chosen = np.take_along_axis(odds, best, -1)
    return _drawn(chosen / chosen.sum(-1, keepdims=True), best, draws)


def by_partition(outputs: Logits, draws: np.ndarray) -> np.ndarray:
    logits = outputs["logits"][:, -1]
    best = np.argpartition(logits, -TOP, -1)[:, -TOP:]
    chosen = np.take_along_axis(logits, best, -1)
    order = np.argsort(-chosen, -1)
    best, chosen = np.take_along_axis(best, order, -1), np.take_along_axis(chosen, order, -1)
    odds = np.exp(chosen - chosen[:, :1])
    return _drawn(odds / odds.sum(-1, keepdims=True), best, draws)


def by_head(outputs: Logits, draws: np.ndarray) -> np.ndarray:
    return _drawn(outputs["values"], outputs["indices"], draws)


def _drawn(odds: np.ndarray, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """odds, tokens [b, TOP], draws [b] in 0..1, to [b, 1]."""
    places = np.minimum((odds.cumsum(-1) < draws[:, None]).sum(-1, keepdims=True), TOP - 1)
    return np.take_along_axis(tokens, places, -1)


WAYS: dict[str, tuple[str, Callable[[Logits, np.ndarray], np.ndarray]]] = {
    "sort": ("plain", by_sorting),
    "partition": ("plain", by_partition),
    "head": ("head", by_head),
}
"""by name: the file, and how a token is made of its outputs"""
FILES: dict[str, list[Head]] = {"plain": [], "head": [Head(topk=TOP), Head(softmax=True)]}


def generated(runner: CachedIr, way: Callable[[Logits, np.ndarray], np.ndarray], ids: np.ndarray) -> tuple[Any, float]:
    """(tokens [b, NEW], CPU seconds of a token but the first, whose prompt is another matter)."""
    draws = np.random.default_rng(0).random((NEW, len(ids)))
    mask = np.ones_like(ids)
    runner.reset()
    found = [way(runner.step({"input_ids": ids, "attention_mask": mask}), draws[0])]
    begun = time.process_time()
    for draw in draws[1:]:
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        found.append(way(runner.step({"input_ids": found[-1], "attention_mask": mask}), draw))
    return np.concatenate(found, 1), (time.process_time() - begun) / (NEW - 1)


def measured(runners: dict[str, CachedIr], batch: int, rounds: int, label: str) -> list[dict[str, Any]]:
    ids = np.random.default_rng(1).integers(0, 50257, (batch, PROMPT))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, Any] = {}
    for number in range(-1, rounds):
        order = list(WAYS)[number % len(WAYS) :] + list(WAYS)[: number % len(WAYS)]
        for way in order:
            file, choose = WAYS[way]
            tokens[way], seconds = generated(runners[file], choose, ids)
            if number >= 0:
                times[way].append(1e3 * seconds)
    for way in ("partition", "head"):
        same = float((tokens[way] == tokens["sort"]).mean())
        assert same > 0.9, f"{label}: {way} draws other tokens than sort ({same:.2f} are the same)"
    return rows(f"{label}/b{batch}", times)


def prompts(runners: dict[str, CachedIr], batch: int, rounds: int, label: str) -> list[dict[str, Any]]:
    ids = np.random.default_rng(2).integers(0, 50257, (batch, LONG))
    times: dict[str, list[float]] = {"partition": [], "head": []}
    for number in range(-1, rounds):
        for way, found in times.items() if number % 2 else reversed(times.items()):
            file, choose = WAYS[way]
            begun = time.process_time()
            choose(runners[file]({"input_ids": ids}), np.full(batch, 0.5))
            if number >= 0:
                found.append(1e3 * (time.process_time() - begun))
    return rows(f"{label}/b{batch}/prompt", times)


def rows(label: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of milliseconds by way; less: what the head takes off."""
    head = statistics.median(times["head"])
    return [
        {
            "name": f"{label}/{way}",
            "token_ms": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "less": 1 - head / statistics.median(found),
        }
        for way, found in times.items()
    ]


def exported(precision: str, folder: Path) -> dict[str, CachedIr]:
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config()).eval()
    if precision == "int8":
        how = WeightOnly(
            mode="weight_only", method="rtn", bits=8, granularity="channel", embeddings="int8", lm_head="int8"
        )
        weight_only.compress(model, how, [])
    example = {"input_ids": torch.arange(16).reshape(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    found = {}
    for name, heads in FILES.items():
        done = export_openvino(
            model,
            example,
            folder / f"{precision}-{name}",
            precision="fp32" if precision == "fp32" else "compressed",
            signature=signature_with(SIGNATURE, heads, TASKS["causal-lm"]),
            cache=LONG + NEW,
        )
        found[name] = CachedIr(done.xml, None, threads=1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/heads.json"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            runners = exported(precision, Path(folder))
            for batch in (1, 8):
                rows += measured(runners, batch, options.rounds, precision)
                rows += prompts(runners, batch, 3, precision)
                for row in rows[-5:]:
                    print({key: value if isinstance(value, str) else round(value, 3) for key, value in row.items()})
            for runner in runners.values():
                runner.close()
            keep(options.json, rows)


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """What there is so far: a run takes minutes."""
    found = {row["name"]: row["less"] for row in rows}
    bars = [
        (f"{precision}, batch 8: the head takes at least 25% of the time off {way} ({100 * less:.0f}%)", less >= BAR)
        for precision in ("fp32", "int8")
        for way in ("sort", "partition")
        for less in [found.get(f"{precision}/b8/{way}")]
        if less is not None
    ]
    columns = {
        "name": "precision/batch/way",
        "token_ms": "ms a token",
        "min": "min",
        "max": "max",
        "less": "head: less",
    }
    write(path, rows, bars, markdown(rows, columns), plotted=None, clock="CPU time of the process")


if __name__ == "__main__":
    main()
