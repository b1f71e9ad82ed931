"""fp16 ONNX files: how many casts, and are they right, against a block list and NVIDIA's AutoCast.

    python -m benchmarks.export.onnx_casts --json benchmarks/results/onnx_casts.json   (needs onnxconverter-common, and
    nvidia-modelopt with onnx-graphsurgeon for the rows of autocast; without them those rows say so)

GPT-2 (12 layers, 124M) and an encoder-decoder like Pegasus (6 + 6 layers of 512) with random weights, in each of which
two channels of one FFN are so large that their values pass 65504, as trained models of both kinds have. All three
convert the very same float32 file, as mptrain exports it (opset 23), on the same calibration inputs. A row:

    casts           operations Cast between float32 and float16 in the file
    casts_ratio     of those that the block list leaves
    cosine          smallest of any output with torch's float32, on inputs of another seed; 0 where it is not finite
    size_bytes      of the file
    latency_ratio   median of rounds, the fp16 file's time over the fp32 file's, in turns, one thread: CPUs mostly
                    have no fp16 kernels, and onnxruntime then casts around each operation
    kept            operations of the torch graph (ours) or the file that stay in float32

ours: `mptrain.export.onnx`. ort_block_list: onnxconverter_common.convert_float_to_float16 with its own block list and
the operations that people add to it against overflow. autocast: modelopt.onnx.autocast with the calibration inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers as t
from torch import Tensor, nn

from benchmarks.kit.paired import write
from mptrain.core.signature import Signature, probed, without_cache
from mptrain.export.onnx import convert
from mptrain.export.onnx.facts import facts
from mptrain.export.onnx.runner import Session
from mptrain.verify import overflow
from mptrain.verify.outputs import rows

BLOCKED = ["LayerNormalization", "Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Div", "Exp", "Erf", "Tanh"]
ROUNDS = 7
Batch = dict[str, Tensor]


def gpt2() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config()).eval()
    with torch.no_grad():
        _loud(model.transformer.h[3].mlp.c_fc.weight[:, :2], model.transformer.h[3].mlp.c_proj.weight[:2])
    return model, [_texts(seed, 50257) for seed in range(3)]


def pegasus() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    sizes = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 32000}
    model = t.PegasusForConditionalGeneration(t.PegasusConfig(**sizes, **heads, use_cache=False)).eval()
    with torch.no_grad():
        layer = model.model.encoder.layers[2]
        _loud(layer.fc1.weight[:2], layer.fc2.weight[:, :2])
    batches = []
    for seed in range(3):
        batch = _texts(seed, 32000)
        batches.append(batch | {"decoder_input_ids": _texts(seed + 10, 32000, 12)["input_ids"]})
    return model, batches


def _loud(up: Tensor, down: Tensor) -> None:
    """Values of two channels become some 1e5, and what reads them takes as much back."""
    up.mul_(1e5 / 0.3)
    down.mul_(1e-5)


def _texts(seed: int, vocabulary: int, length: int = 48) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -length // 4 :] = 0
    return {"input_ids": torch.randint(vocabulary, (2, length), generator=draw), "attention_mask": mask}


MODELS = {"gpt2": gpt2, "pegasus": pegasus}


def ours(model: nn.Module, batches: list[Batch], signature: Signature, exact: Path, into: Path) -> int:
    done = convert.write(model, batches[0], into, precision="fp16", calibration=batches[:2], signature=signature)
    return len((done.half or {})["kept_fp32"])


def ort_block_list(model: nn.Module, batches: list[Batch], signature: Signature, exact: Path, into: Path) -> None:
    from onnxconverter_common import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *BLOCKED]
    made = float16.convert_float_to_float16(onnx.load(exact), op_block_list=blocked, keep_io_types=True)
    onnx.save(made, into / convert.FILE)


def autocast(model: nn.Module, batches: list[Batch], signature: Signature, exact: Path, into: Path) -> None:
    import numpy as np
    from modelopt.onnx.autocast import convert_to_mixed_precision

    data = into / "calibration.npz"
    np.savez(data, **{name: value.numpy() for name, value in batches[0].items()})
    made = convert_to_mixed_precision(str(exact), calibration_data=str(data), keep_io_types=True)
    onnx.save(made, into / convert.FILE)
    data.unlink()


WAYS = {"ours": ours, "ort_block_list": ort_block_list, "autocast": autocast}


def measured(
    name: str, model: nn.Module, batches: list[Batch], signature: Signature, exact: Path, way: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        try:
            kept = WAYS[way](model, batches, signature, exact, Path(folder))
            session = Session(Path(folder) / convert.FILE, 1)
        except Exception as error:
            return {"name": f"{name}/{way}", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        seconds = time.monotonic() - begun
        batch = batches[2]
        with torch.no_grad(), without_cache(model):
            expected = rows(model(**batch), batch, signature)
        difference = overflow.compare(expected, rows(session(batch), batch, signature))
        baseline, ratios = Session(exact, 1), []
        for _ in range(ROUNDS):
            times = []
            for run in (baseline, session):
                start = time.perf_counter()
                run(batch)
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
        path = Path(folder) / convert.FILE
        return {
            "name": f"{name}/{way}",
            "casts": facts(path).float_casts,
            "cosine": difference.cosine if difference.finite else 0.0,
            "size_bytes": path.stat().st_size,
            "size_ratio": path.stat().st_size / exact.stat().st_size,
            "latency_ratio": statistics.median(ratios[1:]),
            "kept": kept,
            "seconds": round(seconds, 1),
        }


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| model/way | casts | of the block list's | cosine | size of fp32's | time of fp32's | kept in fp32 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | |")
            continue
        ratio = f"{row['casts_ratio']:.3f}" if "casts_ratio" in row else ""
        lines.append(
            f"| {row['name']} | {row['casts']} | {ratio} | {row['cosine']:.6f} | {row['size_ratio']:.3f} |"
            f" {row['latency_ratio']:.2f} | {'' if row['kept'] is None else row['kept']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    found = []
    for name in options.models:
        model, batches = MODELS[name]()
        signature = probed(model, batches[0])
        with tempfile.TemporaryDirectory() as folder:
            convert.write(model, batches[0], Path(folder), signature=signature)
            exact = Path(folder) / convert.FILE
            own = [measured(name, model, batches, signature, exact, way) for way in WAYS]
        blocked = next((row.get("casts") for row in own if row["name"].endswith("ort_block_list")), None)
        for row in own:
            if blocked and "casts" in row:
                row["casts_ratio"] = row["casts"] / blocked
            print(json.dumps(row))
        found += own
    if options.json:
        own = [row for row in found if row["name"].endswith("/ours")]
        bars = [
            ("casts at most 5% of what the block list leaves", all(row.get("casts_ratio", 1) <= 0.05 for row in own)),
            ("cosine at least 0.9999", all(row.get("cosine", 0) >= 0.9999 for row in own)),
            ("size at most 0.51 of float32", all(row.get("size_ratio", 1) <= 0.51 for row in own)),
        ]
        write(options.json, found, bars, table(found), plotted=None, rounds=ROUNDS, blocked=BLOCKED)


if __name__ == "__main__":
    main()
