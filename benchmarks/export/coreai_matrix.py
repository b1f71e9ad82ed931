"""Every family exported to Core AI and executed: does it convert, and does the asset compute what torch computes?

    python -m benchmarks.export.coreai_matrix [--rows PATTERN] [--json PATH]

One row per <family>/<attention>/<mask>/<shape>, on random models of two layers. Each asset runs on this
host's CPU, on inputs of other values than the traced ones; where shapes are dynamic also of other
batch sizes and lengths. No timing. A row:

    converted      both precisions converted, saved, loaded and ran
    parity_fp32    largest |asset - torch| of the fp32 asset; positions that the mask leaves out do not count
    cosine_fp16    smallest cosine of the fp16 asset's outputs with torch's fp32 ones
    size_fp32, size_fp16   bytes

Rows that are in the file already are kept, so that a stopped run goes on; --fresh computes them again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers as t

from mptrain.core.errors import MptrainError
from mptrain.core.signature import probed
from mptrain.export.coreai.convert import export_coreai
from mptrain.export.coreai.runner import Asset
from mptrain.verify import overflow
from mptrain.verify.outputs import rows

RESULT = Path(__file__).parents[1] / "results" / "coreai_matrix.json"
BARS = {"parity_fp32": 1e-5, "cosine_fp16": 0.9999}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {"vocab_size": 500, "max_position_embeddings": 80}
FAMILIES = {
    "bert": (t.BertForSequenceClassification, t.BertConfig, _SIZES | _TEXT),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig, _SIZES | _TEXT),
    "distilbert": (
        t.DistilBertForSequenceClassification,
        t.DistilBertConfig,
        _TEXT | {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "vit": (t.ViTForImageClassification, t.ViTConfig, _SIZES | {"image_size": 32, "patch_size": 8}),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig,
        _TEXT
        | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
        | {"num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, _SIZES | _TEXT | {"num_key_value_heads": 2}),
}


def names() -> list[str]:
    return [
        f"{family}/{attn}/{mask}/{shape}"
        for family in FAMILIES
        for attn in ("eager", "sdpa")
        for mask in (("nomask",) if family == "vit" else ("mask", "nomask"))
        for shape in ("fixed", "dynamic")
    ]


def model(family: str, attn: str) -> Any:
    cls, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    built = config(**sizes)
    built._attn_implementation = attn
    return cls(built).eval()


def inputs(family: str, mask: str, batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=draw)}
    found = {"input_ids": torch.randint(4, 500, (batch, length), generator=draw)}
    if mask == "mask":
        lengths = torch.randint(max(1, length // 2), length + 1, (batch, 1), generator=draw)
        found["attention_mask"] = (torch.arange(length) < lengths).long()
    return found


def row(name: str, scratch: Path) -> dict[str, Any]:
    family, attn, mask, shape = name.split("/")
    torch_model = model(family, attn)
    sizes = [(2, 16)] if shape == "fixed" else [(2, 16), (1, 1), (5, 33)]
    batches = [inputs(family, mask, *size, seed=seed) for seed, size in enumerate(sizes, 1)]
    found: dict[str, Any] = {"name": name, "converted": True}
    for precision in ("fp32", "fp16"):
        try:
            done = export_coreai(
                torch_model, inputs(family, mask, 2, 16, 0), scratch / precision, precision=precision, shapes=shape
            )
            runner = Asset(done.asset)
            differences = [compare(torch_model, runner, batch) for batch in batches]
        except MptrainError as error:
            return {"name": name, "converted": False, "error": str(error)[:500]}
        if precision == "fp32":
            found["parity_fp32"] = max(d.max_diff for d in differences)
        else:
            found["cosine_fp16"] = min(d.cosine for d in differences)
        found[f"size_{precision}"] = done.size_bytes
        runner.close()
    return found


def compare(torch_model: Any, runner: Asset, batch: dict[str, torch.Tensor]) -> overflow.Difference:
    signature = probed(torch_model, batch)
    with torch.no_grad():
        expected = rows(torch_model(**batch), batch, signature)
    return overflow.compare(expected, rows(runner(batch), batch, signature))


def passed(found: dict[str, Any]) -> bool:
    return bool(
        found["converted"]
        and found["parity_fp32"] <= BARS["parity_fp32"]
        and found["cosine_fp16"] >= BARS["cosine_fp16"]
    )


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    packages = ("coreai-core", "coreai-torch", "coreai-opt", "torch", "transformers")
    return {
        "about": "random models of two layers, executed by Core AI's runtime on a Linux CPU; not a timing",
        "versions": {package: metadata.version(package) for package in packages},
        "bars": BARS,
        "passed": sum(map(passed, rows)),
        "rows": sorted(rows, key=lambda r: names().index(r["name"])),
    }


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Core AI: every family, executed",
        "",
        f"{found['about']}. {found['passed']} of {len(found['rows'])} rows within the bars"
        f" (parity ≤ {BARS['parity_fp32']:g} in fp32, cosine ≥ {BARS['cosine_fp16']} in fp16).",
        ", ".join(f"{package} {version}" for package, version in found["versions"].items()) + ".",
        "",
        "| row | converted | largest difference, fp32 | cosine, fp16 |",
        "|---|---|--:|--:|",
    ]
    for r in found["rows"]:
        numbers = f"{r['parity_fp32']:.1e} | {r['cosine_fp16']:.7f}" if r["converted"] else f"{r['error']} | "
        lines.append(f"| {r['name']} | {'yes' if r['converted'] else 'no'} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="a pattern, e.g. 'bert/*'")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [] if arguments.fresh or not arguments.json.is_file() else json.loads(arguments.json.read_text())["rows"]
    done = {r["name"] for r in rows}
    for name in names():
        if name in done or not fnmatch.fnmatch(name, arguments.rows):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(row(name, Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
        found = report(rows)
        for path, text in (
            (arguments.json, json.dumps(found, indent=1) + "\n"),
            (arguments.json.with_suffix(".md"), markdown(found)),
        ):
            part = path.with_suffix(path.suffix + ".part")
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
    if not all(map(passed, rows)):
        raise SystemExit("rows outside the bars: " + ", ".join(r["name"] for r in rows if not passed(r)))


if __name__ == "__main__":
    main()
