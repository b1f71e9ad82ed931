"""The table of the GPT-2 user who was stuck: forward, gradient, update, and making the model half again.

    .venv-bench/bin/python benchmarks/seed_gpt2.py --json benchmarks/results/seed_gpt2.json

The user's loop keeps an fp32 model beside a half one: the half model runs forward and backward, AdamW
updates the fp32 weights, and `copy.deepcopy(model).half()` makes the next half model. Ours replaces the last
two with one `MasterWeights.step()`; its sync alone is shown beside. ratio: time over the user's re-adapt.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from paired import bytes_allocated, compare, markdown, write
from transformers import GPT2Config, GPT2LMHeadModel

from mptrain.precision import MasterWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="3 rounds, to try it out")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randint(0, 50_000, (1, options.tokens))
    rows: list[dict[str, Any]] = []
    for dtype, half_dtype in DTYPES.items():
        master = GPT2LMHeadModel(GPT2Config())
        half = copy.deepcopy(master).to(half_dtype)
        update = torch.optim.AdamW(master.parameters(), lr=1e-4, fused=True)
        for parameter in master.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        model = copy.deepcopy(master)
        mw = MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=1e-4), dtype, loss_scale=1.0)
        grads = [torch.full_like(p, 1e-3) for p in model.parameters()]

        def forward(half: Any = half) -> torch.Tensor:
            return half(input_ids=x, labels=x).loss

        def readapt(master: Any = master, half_dtype: torch.dtype = half_dtype) -> Any:
            return copy.deepcopy(master).to(half_dtype)

        def give(model: Any = model, grads: Any = grads) -> None:
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad

        losses: list[torch.Tensor] = []

        def graph(losses: Any = losses, forward: Any = forward, half: Any = half) -> None:
            half.zero_grad()
            losses[:] = [forward()]

        parts = {
            "forward": (forward, None),
            "gradient": (lambda losses=losses: losses[0].backward(), graph),
            "update": (update.step, None),
            "readapt": (readapt, None),
            "ours_step": (mw.step, give),
            "ours_sync": (mw.sync, None),
        }
        for name, (work, before) in parts.items():
            row = compare(f"gpt2/{dtype}/{name}", work, readapt, rounds, before)
            if before is not None:
                before()
            row["bytes_allocated"] = bytes_allocated(work)
            row["MiB"] = row["bytes_allocated"] / 2**20
            rows.append(row)
    found = {r["name"]: r for r in rows}
    bars = [
        (
            "our sync allocates nothing and takes at most a sixth of the user's re-adapt",
            all(
                found[f"gpt2/{d}/ours_sync"]["bytes_allocated"] == 0 and found[f"gpt2/{d}/ours_sync"]["ratio"] <= 1 / 6
                for d in DTYPES
            ),
        ),
        (
            "our whole step takes less than the user's re-adapt alone",
            all(found[f"gpt2/{d}/ours_step"]["ratio"] < 1 for d in DTYPES),
        ),
    ]
    columns = {"name": "row", "ms": "ms", "MiB": "MiB allocated", "ratio": "× re-adapt"}
    write(options.json, rows, bars, markdown(rows, columns), tokens=options.tokens)


if __name__ == "__main__":
    main()
