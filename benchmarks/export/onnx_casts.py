"""fp16 ONNX files: how many casts, and are they right, against a block list and NVIDIA's AutoCast.

    python -m benchmarks.export.onnx_casts --json benchmarks/results/onnx_casts.json   (with the packages of
    benchmarks/requirements-onnx.txt; without them the rows of the peers say so)

GPT-2 (12 layers of 512) and an encoder-decoder like Pegasus (6 + 6 of 512), 8,192 tokens, with random weights, in each
of which two channels of an FFN are so large that their values pass 65504, as trained models of both kinds have. All
ways convert the very same float32 files, as mptrain exports them (opset 23; of an encoder-decoder the encoder and the
decoder), on the same calibration inputs. A row, of all files of a model together:

    casts           operations Cast between float32 and float16 in the files
    casts_ratio     of those that the block list leaves
    cosine          smallest of any output with torch's float32, on inputs of another seed; 0 where it is not finite
    calibrated      the same on the calibration inputs
    size_bytes      of the files
    latency_ratio   median of rounds, the fp16 files' time over the fp32 files', in turns, one thread: CPUs mostly
                    have no fp16 kernels, and onnxruntime then casts around each operation
    kept            operations of the torch graph that stay in float32 (ours alone)

Rows of models that --models does not name are kept. ours: `mptrain.export.onnx`. ort_block_list: of
onnxconverter_common, convert_float_to_float16 with its own block list and the operations that people add to it against
overflow. autocast: modelopt.onnx.autocast with the calibration inputs. A row with `error` is a file that the peer could
not make, or that onnxruntime refuses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers as t
from torch import Tensor, nn

from benchmarks.kit.paired import write
from mptrain.core.signature import Forward, Signature, probed
from mptrain.export.onnx import convert
from mptrain.export.onnx.parts import Part, parts_of
from mptrain.export.onnx.runner import opened
from mptrain.verify import overflow
from mptrain.verify.difference import Difference, worst
from mptrain.verify.outputs import of_model, rows

BLOCKED = ["LayerNormalization", "Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Div", "Exp", "Erf", "Tanh"]
ROUNDS = 7
Batch = dict[str, Tensor]


def gpt2() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=512, n_head=8, vocab_size=8192)).eval()
    with torch.no_grad():
        _loud(model.transformer.h[3].mlp.c_fc.weight[:, :2], model.transformer.h[3].mlp.c_proj.weight[:2])
    return model, [_texts(seed, 8192) for seed in range(3)]


def pegasus() -> tuple[nn.Module, list[Batch]]:
    sizes = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 8192}
    return _writes(t.PegasusForConditionalGeneration, t.PegasusConfig(**sizes, **heads, use_cache=False), 8192)


def _writes(kind: Any, config: Any, vocabulary: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for layer in (model.model.encoder.layers[2], model.model.decoder.layers[3]):
            _loud(layer.fc1.weight[:2], layer.fc2.weight[:, :2])
    batches = []
    for seed in range(3):
        batch = _texts(seed, vocabulary)
        batches.append(batch | {"decoder_input_ids": _texts(seed + 10, vocabulary, 12)["input_ids"]})
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


def ours(model: nn.Module, batches: list[Batch], parts: list[Part], exact: Path, into: Path) -> int:
    done = convert.write(model, batches[0], into, precision="fp16", calibration=batches[:2])
    return len((done.half or {})["kept_fp32"])


def ort_block_list(model: nn.Module, batches: list[Batch], parts: list[Part], exact: Path, into: Path) -> None:
    from onnxconverter_common import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *BLOCKED]
    for part in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each small number
            made = float16.convert_float_to_float16(
                onnx.load(exact / part.file), op_block_list=blocked, keep_io_types=True
            )
        onnx.save(made, into / part.file)


def autocast(model: nn.Module, batches: list[Batch], parts: list[Part], exact: Path, into: Path) -> None:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    for part in parts:
        data = into / "calibration.npz"
        np.savez(data, **{name: value.numpy() for name, value in part.call(batches[0]).items()
                          if name in part.ports.input_names})  # fmt: skip
        made = convert_to_mixed_precision(str(exact / part.file), calibration_data=str(data), keep_io_types=True)
        onnx.save(made, into / part.file)
        data.unlink()


WAYS = {"ours": ours, "ort_block_list": ort_block_list, "autocast": autocast}


def measured(
    name: str, model: nn.Module, batches: list[Batch], signature: Signature, parts: list[Part], exact: Path, way: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        path = Path(folder) / parts[-1].file
        try:
            kept = WAYS[way](model, batches, parts, exact, Path(folder))
            seconds = time.monotonic() - begun
            runner = opened(path, threads=1)
            given = [rows(runner(batch), batch, signature) for batch in batches]
        except Exception as error:
            said = " ".join(str(error).split())
            return {"name": f"{name}/{way}", "error": f"{type(error).__name__}: {said[:200]} … {said[-200:]}"}
        found = list(map(overflow.compare, of_model(model, batches, signature), given))
        sizes = [sum(file.stat().st_size for file in where.glob("*.onnx*")) for where in (Path(folder), exact)]
        return {
            "name": f"{name}/{way}",
            "casts": runner.facts().float_casts,
            "cosine": _cosine(found[2:]),
            "calibrated": _cosine(found[:2]),
            "size_bytes": sizes[0],
            "size_ratio": sizes[0] / sizes[1],
            "latency_ratio": _ratio(opened(exact / parts[-1].file, threads=1), runner, batches[2]),
            "kept": kept,
            "seconds": round(seconds, 1),
        }


def _cosine(found: list[Difference]) -> float:
    difference = worst(found)
    return difference.cosine if difference.finite else 0.0


def _ratio(baseline: Forward, runner: Forward, batch: Batch) -> float:
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for run in (baseline, runner):
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios[1:])


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
    kept = json.loads(options.json.read_text())["rows"] if options.json and options.json.is_file() else []
    found = [row for row in kept if row["name"].split("/")[0] not in options.models]
    for name in options.models:
        found += compared(name)
        if options.json:
            report(options.json, found)


def compared(name: str) -> list[dict[str, Any]]:
    """The rows of a model."""
    model, batches = MODELS[name]()
    signature = probed(model, batches[0])
    parts = parts_of(model, batches[0], signature, cached=False)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder)
        convert.write(model, batches[0], exact, signature=signature)
        found = []
        for way in WAYS:
            found.append(measured(name, model, batches, signature, parts, exact, way))
            print(json.dumps(found[-1]), flush=True)
    blocked = next((row.get("casts") for row in found if row["name"].endswith("ort_block_list")), None)
    for row in found:
        if blocked and "casts" in row:
            row["casts_ratio"] = row["casts"] / blocked
    return found


def report(path: Path, found: list[dict[str, Any]]) -> None:
    own = [row for row in found if row["name"].endswith("/ours")]
    bars = [
        ("no overflow on the calibration inputs", all(row.get("calibrated", 0) >= 0.9999 for row in own)),
        ("casts at most 5% of what the block list leaves", all(row.get("casts_ratio", 1) <= 0.05 for row in own)),
        ("cosine at least 0.9999", all(row.get("cosine", 0) >= 0.9999 for row in own)),
        ("size at most 0.51 of float32", all(row.get("size_ratio", 1) <= 0.51 for row in own)),
    ]
    more: dict[str, Any] = {"clock": "wall time", "rounds": ROUNDS, "blocked": BLOCKED}
    write(path, found, bars, table(found), plotted=None, **more)


if __name__ == "__main__":
    main()
