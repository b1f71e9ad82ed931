"""Palettizing one weight, k-means to metadata, ours against coremltools.

    .venv-bench/bin/python -m benchmarks.weights.kmeans --json benchmarks/results/kmeans.json

Both sides start from a Linear with float32 weights (and, weighted, the same importance), end with its
palettized weight and the metadata that coremltools' converter reads, and run in one thread.
speedup: coremltools' time over ours, the median of paired rounds. sse_over_exact: the largest ratio of
our weighted sum of squares to the exact minimum, over sampled groups. peak_bytes_over_weight: growth
of the resident set while we work, results included, over the weight's bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import logging
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.kit.paired import markdown, seconds, write
from mptrain.compress.weights.palettize import palettized, tables
from mptrain.compress.weights.records import Palettized, attach
from mptrain.recipe import Palettize

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
from coremltools._deps import _kmeans1d  # noqa: E402
from coremltools.optimize.torch._utils.k_means import KMeansConfig, SequentialKMeans  # noqa: E402
from coremltools.optimize.torch._utils.metadata_utils import CompressionMetadata, register_metadata_version  # noqa: E402

BITS = 4
GROUPS = {"g4": 4, "g16": 16, "g32": 32, "tensor": None}
SAMPLED = 8
LONG = 15.0
"""seconds of coremltools after which one round is enough"""


def weight(kind: str, size: int) -> Tensor:
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if kind == "gauss" else lambda shape: rng.standard_t(5, shape)
    return torch.from_numpy((0.02 * draw((size, size))).astype(np.float32))


def importance(size: int) -> Tensor:
    """Squared gradients vary over orders of magnitude."""
    return torch.from_numpy((np.random.default_rng(1).random((size, size)) ** 4 + 1e-6).astype(np.float32))


def model_of(values: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(*values.shape[::-1], bias=False))
    model[0].weight.data = values.clone()
    return model


def ours(model: nn.Module, rows: int | None, heavy: Tensor | None) -> Palettized:
    granularity = {"granularity": "tensor"} if rows is None else {"group_size": rows}
    config = Palettize.model_validate({"method": "kmeans", "bits": BITS, **granularity})
    ((name, table),) = tables(model, config).items()
    record = palettized(name, model.get_parameter(name), table, heavy)
    attach(model, {name: record})
    metadata = CompressionMetadata("weight")
    metadata.compression_type = ["palettization"]
    metadata.lut = record.lut[:, None]
    metadata.register(model[0])
    register_metadata_version(model)
    return record


def coremltools_way(model: nn.Module, rows: int | None, heavy: Tensor | None) -> None:
    config = KMeansConfig(n_bits=BITS, axis=0, block_size=rows, importance=heavy)
    SequentialKMeans.cluster_weights(model, {"0": {"weight": config}})


def exact(values: np.ndarray, heavy: np.ndarray | None) -> float:
    """The least weighted sum of squares, float64, by coremltools' exact dynamic programming."""
    found = _kmeans1d.cluster(values, 2**BITS, **({} if heavy is None else {"weights": heavy}))
    errors = (values - np.asarray(found.centroids)[np.asarray(found.clusters)]) ** 2
    return float((errors if heavy is None else errors * heavy).sum())


def sse_over_exact(values: Tensor, record: Palettized, heavy: Tensor | None) -> float:
    groups = record.lut.shape[0]
    grouped, dense = (t.reshape(groups, -1).double().numpy() for t in (values, record.dense()))
    weights = None if heavy is None else heavy.reshape(groups, -1).double().numpy()
    worst = 0.0
    for g in np.linspace(0, groups - 1, min(groups, SAMPLED)).astype(int):
        own = None if weights is None else weights[g]
        squares = (grouped[g] - dense[g]) ** 2 * (1.0 if own is None else own)
        worst = max(worst, float(squares.sum()) / exact(grouped[g], own))
    return worst


def peak_bytes(work: Any) -> int:
    """Growth of the resident set's high-water mark (Linux)."""

    def status(key: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return 1024 * int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = work()
    grown = status("VmHWM") - before
    del kept
    return grown


def row(name: str, size: int, rounds: int) -> dict[str, Any]:
    kind, _, granularity, weighting = name.split("/")
    rows, values = GROUPS[granularity], weight(kind, size)
    heavy = importance(size) if weighting == "weighted" else None
    model = model_of(values)
    record = ours(model, rows, heavy)
    model = model_of(values)
    peak = peak_bytes(lambda: ours(model, rows, heavy))
    times: dict[str, list[float]] = {"ours": [], "coremltools": []}
    for _ in range(rounds):
        model = model_of(values)
        times["ours"].append(seconds(lambda: ours(model, rows, heavy)))  # noqa: B023
        model = model_of(values)
        times["coremltools"].append(seconds(lambda: coremltools_way(model, rows, heavy)))  # noqa: B023
        if times["coremltools"][-1] > LONG:
            break
    ratios = [theirs / mine for theirs, mine in zip(times["coremltools"], times["ours"], strict=True)]
    reference = model[0].weight.detach()
    squares = [(values - w).double().square() * (1.0 if heavy is None else heavy) for w in (record.dense(), reference)]
    found = {
        "name": name,
        "speedup": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": len(ratios),
        "ms": 1e3 * statistics.median(times["ours"]),
        "coremltools_ms": 1e3 * statistics.median(times["coremltools"]),
        "sse_over_exact": sse_over_exact(values, record, heavy),
        "sse_over_coremltools": float(squares[0].sum() / squares[1].sum()),
        "peak_bytes_over_weight": peak / (4 * values.numel()),
    }
    print(
        f"{name:32s} {found['speedup']:8.1f} times  SSE {found['sse_over_exact']:.5f} of the exact minimum,"
        f" peak {found['peak_bytes_over_weight']:.2f} of the weight",
        flush=True,
    )
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def judge(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    bars = []
    for weighting, bar in (("unweighted", 5), ("weighted", 30)):
        mine = [r for r in rows if r["name"].endswith(f"/{weighting}")]
        mean = geometric_mean([r["speedup"] for r in mine])
        fine = [r["speedup"] for r in mine if r["name"].split("/")[2] in ("g4", "g16")]
        bars.append((f"{weighting}, g4 and g16: at least {bar} times (least {min(fine):.1f})", min(fine) >= bar))
        bars.append((f"{weighting}, geometric mean: at least {bar} times ({mean:.1f})", mean >= bar))
    return [
        *bars,
        ("no row below 2 times", all(r["speedup"] >= 2 for r in rows)),
        ("sum of squares at most 1.005 of the exact minimum", all(r["sse_over_exact"] <= 1.005 for r in rows)),
        ("peak below 3 times the weight", all(r["peak_bytes_over_weight"] < 3 for r in rows)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--rows", default="*", metavar="PATTERN", help="only rows like 'gauss/4b/*'; no bars are judged"
    )
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [f"{k}/{BITS}b/{g}/{w}" for k in ("gauss", "heavy") for g in GROUPS for w in ("unweighted", "weighted")]
    chosen = fnmatch.filter(every, options.rows)
    if not chosen:
        parser.error(f"--rows {options.rows!r} matches none of {', '.join(every)}")
    rows = [row(name, options.size, options.rounds) for name in chosen]
    columns = {
        "name": "row",
        "speedup": "speedup",
        "ms": "ms",
        "coremltools_ms": "coremltools, ms",
        "sse_over_exact": "SSE / exact",
        "sse_over_coremltools": "SSE / coremltools",
        "peak_bytes_over_weight": "peak / weight",
    }
    bars = judge(rows) if chosen == every else []
    write(
        options.json,
        rows,
        bars,
        markdown(rows, columns),
        plotted=("speedup", "times as fast as coremltools"),
        size=options.size,
    )


if __name__ == "__main__":
    main()
