"""The table of the GPT-2 user who was stuck: forward, gradient, update, and making the model half again.

    .venv-bench/bin/python -m benchmarks.precision.seed_gpt2 --json benchmarks/results/seed_gpt2.json

The user's loop keeps an fp32 model beside a half one: the half model runs forward and backward, AdamW
updates the fp32 weights, and `half = copy.deepcopy(model).half()` makes the next half model. Ours replaces the
last two with one `MasterWeights.step()`; its sync alone is shown beside. Both loops run whole, a step of the
one after a step of the other, and every part is timed where it stands. ratio: time over the user's re-adapt.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.kit.paired import bytes_allocated, markdown, seconds, write
from mptrain.precision import MasterWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = {"lr": 1e-4, "fused": True}
Part = Callable[[], Any]


class UserLoop:
    """As written by hand."""

    def __init__(self, model: GPT2LMHeadModel, dtype: torch.dtype, ids: torch.Tensor) -> None:
        self.model, self.dtype, self.ids = model, dtype, ids
        self.optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
        self.readapt()

    def forward(self) -> None:
        self.loss = self.half(input_ids=self.ids, labels=self.ids).loss

    def gradient(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        for parameter, half in zip(self.model.parameters(), self.half.parameters(), strict=True):
            parameter.grad = half.grad.float()
        self.optimizer.step()

    def readapt(self) -> None:
        self.half = copy.deepcopy(self.model).to(self.dtype)

    def parts(self) -> dict[str, Part]:
        return {p.__name__: p for p in (self.forward, self.gradient, self.update, self.readapt)}


class OurLoop:
    """With MasterWeights: no second model."""

    def __init__(self, model: GPT2LMHeadModel, dtype: str, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.weights = MasterWeights(model, torch.optim.AdamW(model.parameters(), **SETTINGS), dtype, loss_scale=1.0)

    def ours_forward(self) -> None:
        self.loss = self.model(input_ids=self.ids, labels=self.ids).loss

    def ours_gradient(self) -> None:
        self.weights.backward(self.loss)

    def ours_step(self) -> None:
        self.weights.step()

    def ours_sync(self) -> None:
        self.weights.sync()

    def parts(self) -> dict[str, Part]:
        return {p.__name__: p for p in (self.ours_forward, self.ours_gradient, self.ours_step, self.ours_sync)}


def table(dtype: str, ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """The rows of one dtype. The first round is not counted: it makes the moments."""
    model = GPT2LMHeadModel(GPT2Config())
    loops = UserLoop(copy.deepcopy(model), DTYPES[dtype], ids).parts(), OurLoop(model, dtype, ids).parts()
    times: dict[str, list[float]] = {name: [] for loop in loops for name in loop}
    for number in range(rounds + 1):
        for loop in loops if number % 2 else reversed(loops):
            for name, part in loop.items():
                took = seconds(part)
                if number:
                    times[name].append(took)
    allocated = {name: bytes_allocated(part) for loop in loops for name, part in loop.items()}
    rows = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times["readapt"], strict=True)]
        row = {"name": f"gpt2/{dtype}/{name}", "ratio": statistics.median(ratios), "min": min(ratios)}
        row |= {"max": max(ratios), "rounds": rounds, "ms": 1e3 * statistics.median(mine)}
        row |= {"bytes_allocated": allocated[name], "MiB": allocated[name] / 2**20}
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="2 rounds, to try it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 50_000, (1, options.tokens))
    rows = [row for dtype in DTYPES for row in table(dtype, ids, 2 if options.quick else options.rounds)]
    found = {r["name"].removeprefix("gpt2/"): r for r in rows}

    def every(check: Callable[[str], bool]) -> bool:
        return all(check(dtype) for dtype in DTYPES)

    bars = [
        ("our sync allocates nothing", every(lambda d: found[f"{d}/ours_sync"]["bytes_allocated"] == 0)),
        (
            "our sync takes at most a sixth of the user's re-adapt",
            every(lambda d: found[f"{d}/ours_sync"]["ratio"] <= 1 / 6),
        ),
        (
            "our whole step takes less than the user's re-adapt alone",
            every(lambda d: found[f"{d}/ours_step"]["ratio"] < 1),
        ),
    ]
    columns = {"name": "row", "ms": "ms", "MiB": "MiB allocated", "ratio": "× re-adapt"}
    write(options.json, rows, bars, markdown(rows, columns), tokens=options.tokens)


if __name__ == "__main__":
    main()
