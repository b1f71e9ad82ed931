"""A recurrence kept as a loop, beside the same network written out for one length and padded to the longest.

    python -m benchmarks.recurrence --json benchmarks/results/recurrence.json

The click model of the recipe dien-ctr (a GRU, attention, an AUGRU; random weights) in OpenVINO and onnxruntime, one
thread, after an item and histories that make so many tokens. `loop` is our export, one file for all lengths; `unrolled`
a file to each length, traced or exported without `mptrain.Recurrence`; `padded` the unrolled file of the longest, whose
inputs are padded. Rounds take turns; the clock is the CPU time of the process, for OpenVINO computes in a thread of its
own. seconds: to make the file and to load it.
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
import onnxruntime as ort
import openvino as ov
import torch
from torch import nn
from torch.export import Dim

from benchmarks.kit.paired import markdown, write
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.data.sources.dien import dien
from mptrain.export.onnx import convert as onnx
from mptrain.export.openvino import convert as openvino
from mptrain.recipe.exports.onnx import OPSET

LENGTHS, BATCHES, ROUNDS, VOCABULARY = (4, 16, 48), (1, 16), 31, 35
SIGNATURE = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("attention_mask", (BATCH, "tokens"), "int64")),
    (Port("output", (BATCH, 1)),),
)
Arrays = dict[str, np.ndarray]
Forward = Callable[[Arrays], Any]
Row = dict[str, Any]


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_openvino(model: nn.Module, length: int | None) -> Forward:
    """length: of an unrolled file; None: the loop."""
    if length is None:
        graph = openvino.convert(model, inputs(2, 9), SIGNATURE)
    else:
        graph = ov.convert_model(model, example_input=tuple(inputs(2, length).values()))
        for port, name in zip(graph.inputs, SIGNATURE.input_names):
            port.get_tensor().set_names({name})
            port.get_node().set_partial_shape(ov.PartialShape([-1, length]))
        graph.validate_nodes_and_infer_types()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    return lambda arrays: request.infer(arrays, share_inputs=True)[0]


def in_onnxruntime(model: nn.Module, length: int | None) -> Forward:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if length is None:
            path = onnx.write(model, inputs(2, 9), Path(folder), signature=SIGNATURE).path
        else:
            program = torch.export.export(
                model, tuple(inputs(2, length).values()), dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
            )
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=SIGNATURE.input_names, verbose=False
            )
            assert made is not None
            made.save(path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


RUNTIMES = {"OpenVINO": in_openvino, "onnxruntime": in_onnxruntime}


def padded(arrays: Arrays) -> Arrays:
    return {name: np.pad(value, ((0, 0), (0, max(LENGTHS) - value.shape[1]))) for name, value in arrays.items()}


def timed(forwards: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(ROUNDS):
        for name, forward in forwards.items():
            forward()
            begun = time.process_time()
            forward()
            found[name].append(time.process_time() - begun)
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def measured(runtime: str, make: Callable[[nn.Module, int | None], Forward], model: nn.Module) -> tuple[list[Row], Row]:
    made: dict[int | None, Forward] = {}
    seconds: Row = {}
    for length in (None, *LENGTHS):
        begun = time.process_time()
        made[length] = make(model, length)
        seconds["loop" if length is None else f"unrolled {length}"] = round(time.process_time() - begun, 1)
    rows = []
    for batch in BATCHES:
        for length in LENGTHS:
            given = inputs(batch, length)
            arrays = {name: value.numpy() for name, value in given.items()}
            longer = padded(arrays)
            ways = {
                "loop": lambda a=arrays: made[None](a),
                "unrolled": lambda a=arrays, n=length: made[n](a),
                "padded": lambda a=longer: made[max(LENGTHS)](a),
            }
            wanted = model(**given).numpy()
            wrong = max(float(np.abs(way() - wanted).max()) for way in ways.values())
            ms = timed(ways)
            rows.append({"name": f"{runtime}, batch {batch}, {length} tokens", "length": length, "batch": batch, **ms,
                         "of_unrolled": ms["loop"] / ms["unrolled"], "of_padded": ms["loop"] / ms["padded"],
                         "difference": wrong})  # fmt: skip
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()})
    return rows, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = dien(VOCABULARY).eval()
    rows: list[Row] = []
    making: Row = {}
    for runtime in options.runtimes:
        found, making[runtime] = measured(runtime, RUNTIMES[runtime], model)
        rows += found
    short = [row for row in rows if row["length"] < max(LENGTHS)]
    bars = [
        ("right at every length to 1e-4", all(row["difference"] < 1e-4 for row in rows)),
        ("faster than padded to the longest at every shorter length", all(row["of_padded"] < 1 for row in short)),
        (
            "faster than written out for 16 tokens and more",
            all(r["of_unrolled"] < 1 for r in rows if r["length"] >= 16),
        ),
    ]
    columns = {name: name for name in ("name", "loop", "unrolled", "padded", "of_unrolled", "of_padded")}
    more = {"cpu_seconds_to_make": making, "clock": "CPU time of the process"}
    write(options.json, rows, bars, markdown(rows, columns), plotted=None, **more)


if __name__ == "__main__":
    main()
