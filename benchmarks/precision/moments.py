"""Training with AdamW's moments in 8 bits ends where AdamW in fp32 ends: GPT-2-like, BERT and ViT.

    .venv/bin/python -m benchmarks.precision.moments --json benchmarks/results/moments.json

Models, batches and settings of equivalence.py: 200 steps each, and 1,000 of the GPT-2. bf16_split has fp32 moments, so
what it is off by is not the codes' doing. ratio: relative difference to fp32 of the mean loss of the last 20 steps;
`evaluation`: that of the loss on held-out batches at the end, with the masters; `window`: the largest over all windows
of 20 steps. `--rows` takes peers in .venv-bench: bitsandbytes and torchao with 8-bit states on fp32 weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kit.paired import markdown, write
from benchmarks.precision.equivalence import EPS, LR, MODELS, WINDOW, batch, difference, train
from mptrain import MasterWeights

BAR = 1e-3
RUNS = (("gpt2", 200), ("bert", 200), ("vit", 200), ("gpt2", 1000))


def masters(moments: Any) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: MasterWeights(
        model, torch.optim.AdamW(model.parameters(), lr=lr, eps=EPS), "bf16", "split", moments=moments
    )


def bitsandbytes_8bit(model: nn.Module, lr: float) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=lr, eps=EPS, min_8bit_size=1)


def torchao_8bit(model: nn.Module, lr: float) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=lr, eps=EPS)


WAYS: dict[str, Callable[[nn.Module, float], Any]] = {
    "bf16_split": masters("fp32"),
    "bf16_split_int8": masters("int8"),
    "bitsandbytes_fp32_8bit": bitsandbytes_8bit,
    "torchao_fp32_8bit": torchao_8bit,
}


def trained(name: str, steps: int, way: str) -> tuple[Tensor, float]:
    """(losses [steps], loss on held-out batches)."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    optimizer = WAYS[way](model, LR[name])
    losses = []
    for number in range(steps):
        loss = model(**batch(name, number)).loss
        losses.append(loss.item())
        if isinstance(optimizer, MasterWeights):
            optimizer.backward(loss)
            optimizer.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plain = (optimizer.release() if isinstance(optimizer, MasterWeights) else copy.deepcopy(model)).eval()
    with torch.no_grad():
        held_out = [plain(**batch(name, 1_000_000 + i)).loss.item() for i in range(16)]
    return torch.tensor(losses), sum(held_out) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    ours = ["bf16_split", "bf16_split_int8"]
    parser.add_argument("--rows", nargs="+", choices=WAYS, default=ours, help="peers too, where they are installed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, steps in RUNS:
        expected = train(name, steps)
        for way in options.rows:
            windows, evaluation = difference(trained(name, steps, way), expected)
            row: dict[str, Any] = {"name": f"{name}/{steps}/{way}", "ratio": windows[-1], "window": max(windows)}
            row |= {"evaluation": evaluation, "rounds": len(windows), "bar": BAR}
            row |= {"fp32_first": expected[0][:WINDOW].mean().item(), "fp32_last": expected[0][-WINDOW:].mean().item()}
            rows.append(row)
            print(
                f"{row['name']:36s} end {windows[-1]:.1e} worst {max(windows):.1e} evaluation {evaluation:.1e}",
                flush=True,
            )
    coded = [r for r in rows if r["name"].endswith("bf16_split_int8")]
    bars = [
        (
            "bf16_split_int8 ends within 0.1% of fp32, evaluated too",
            all(max(r["ratio"], r["evaluation"]) <= BAR for r in coded),
        )
    ]
    keys = ("ratio", "window", "evaluation")
    shown = [{k: f"{v:.1e}" if k in keys else v for k, v in r.items()} for r in rows]
    for row in shown:
        row["fell"] = f"{row['fp32_first']:.3f} to {row['fp32_last']:.3f}"
    columns = {"name": "row", "fell": "fp32 loss, first and last window", "ratio": "last loss"}
    table = markdown(shown, columns | {"window": "largest of all windows", "evaluation": "evaluation loss"})
    write(options.json, rows, bars, f"Relative differences to AdamW in fp32.\n\n{table}", plotted=None)


if __name__ == "__main__":
    main()
