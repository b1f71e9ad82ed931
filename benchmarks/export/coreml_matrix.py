"""Does it convert, and does the package compute what the model computes? Six families, every way to export them.

    .venv-bench/bin/python -m benchmarks.export.coreml_matrix --json benchmarks/results/coreml_matrix.json

Rows `<family>/<attn>/<route>/<mask>/<shape>`: small random models (2 layers), converted once for float32 and
once for float16, saved, and read back by the reference interpreter. `parity_fp32` is the largest difference of
an output to torch, `cosine_fp16` the least cosine of the outputs of a batch; ranged packages run at batches and
lengths other than the traced ones, padding is not compared. Not a timing: the numbers are the same anywhere.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from mptrain.core.disk import write_json
from mptrain.export.coreml.convert import export_coreml
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import CoreMlShapes

TEXT = {"vocab_size": 50, "max_position_embeddings": 40}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES | TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SIZES | TEXT),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} | TEXT,
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", SIZES | {"image_size": 16, "patch_size": 4}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
        | TEXT,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES | {"num_key_value_heads": 2} | TEXT),
}
FIXED = CoreMlShapes(kind="fixed", batch=[2], length=[9])
RANGED = CoreMlShapes(kind="ranged", batch=[1, 4], length=[1, 32])
RUNS = {"fixed": [(2, 9)], "ranged": [(1, 1), (2, 2), (1, 7), (3, 16), (4, 32)]}


def names() -> list[str]:
    """Of all rows; images have no mask."""
    found = []
    for family in MODELS:
        masks = ["nomask"] if family == "vit" else ["mask", "nomask"]
        found += product([family], ["eager", "sdpa"], ["trace", "export"], masks, ["fixed", "ranged"])
    return ["/".join(parts) for parts in found]


def model_of(family: str, attn: str) -> torch.nn.Module:
    """In eval mode, with weights far enough from each other that every unit matters."""
    config_class, model_class, values = MODELS[family]
    config = getattr(transformers, config_class)(**values)
    config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(family: str, batch: int, length: int, mask: bool) -> dict[str, Tensor]:
    """Random; with a mask the first row ends in padding where there is room."""
    draw = torch.Generator().manual_seed(100 * batch + length)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}
    found = {"input_ids": torch.randint(4, 50, (batch, length), generator=draw)}
    if mask:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        found["attention_mask"][0, max(1, length - 2) :] = 0
    return found


def row(name: str, folder: Path) -> dict[str, Any]:
    """{name, converted, parity_fp32, cosine_fp16}; with `error` where the conversion or a run failed."""
    family, attn, route, mask, shape = name.split("/")
    model = model_of(family, attn)
    found: dict[str, Any] = {"name": name, "converted": False, "parity_fp32": None, "cosine_fp16": None}
    try:
        example = inputs(family, 2, 9, mask == "mask")
        packages = {
            precision: export_coreml(
                model,
                example,
                folder / precision,
                precision=precision,
                shapes=FIXED if shape == "fixed" else RANGED,
                route=route,
            ).package
            for precision in ("fp32", "fp16")
        }
        found["converted"] = True
        exact, half = Interpreter(packages["fp32"]), Interpreter(packages["fp16"])
        largest, cosine = 0.0, 1.0
        for batch, length in RUNS[shape]:
            given = inputs(family, batch, length, mask == "mask")
            for expected, ours, rounded in compared(model, exact, half, given):
                largest = max(largest, float((expected - ours).abs().max()))
                cosine = min(cosine, float(torch.cosine_similarity(expected, rounded, dim=0)))
        found |= {"parity_fp32": largest, "cosine_fp16": cosine}
    except Exception as error:  # a row that fails is a result
        found["error"] = f"{type(error).__name__}: {error}"[:500]
    return found


@torch.no_grad()
def compared(
    model: torch.nn.Module, exact: Interpreter, half: Interpreter, given: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each output of torch, of the float32 and of the float16 package, flat, in float64, without padding."""
    expected, ours, rounded = model(**given), exact(given), half(given)
    for name in exact.outputs:
        values = [torch.as_tensor(found[name]).double() for found in (expected, ours, rounded)]
        if values[0].dim() == 3 and "attention_mask" in given:
            values = [value[given["attention_mask"].bool()] for value in values]
        yield tuple(value.flatten() for value in values)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="run a part, e.g. 'bert/*'; others are kept")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows; those there that do not run stay")
    options = parser.parse_args()
    known = {}
    if options.json and options.json.is_file():
        known = {found["name"]: found for found in json.loads(options.json.read_text())["rows"]}
    chosen = [name for name in names() if fnmatch.fnmatch(name, options.rows)]
    for name in tqdm(chosen, unit="row"):
        with tempfile.TemporaryDirectory() as folder:
            known[name] = row(name, Path(folder))
        if options.json:
            write_json(options.json, summary([known[n] for n in names() if n in known]))
    for found in (known[name] for name in chosen):
        print(found.get("error") or "{name}: fp32 {parity_fp32:.1e}, fp16 cosine {cosine_fp16:.6f}".format(**found))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    done = [found for found in rows if found["parity_fp32"] is not None]
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "coremltools")},
        "rows": rows,
        "converted": sum(found["converted"] for found in rows),
        "worst_parity_fp32": max((found["parity_fp32"] for found in done), default=None),
        "worst_cosine_fp16": min((found["cosine_fp16"] for found in done), default=None),
    }


if __name__ == "__main__":
    main()
