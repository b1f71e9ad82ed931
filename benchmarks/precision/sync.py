"""What it costs to bring fp32 weights into the half model: ours against five ways people write it.

    .venv-bench/bin/python -m benchmarks.precision.sync --json benchmarks/results/sync.json

ratio: time over one contiguous `copy_` between two separate preallocated buffers that moves the same
bytes, 6 per element (3 read, 3 written). `ours` is `MasterWeights.sync()`. `deepcopy_half` asks for fresh
memory: freed memory is given back to the system before each of its rounds (malloc_trim), for otherwise it
depends on what ran before whether glibc still holds some; `ratio_reused` is the ratio when it may.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from benchmarks.kit.paired import bytes_allocated, compare, markdown, write
from mptrain.precision import MasterWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WAYS = ("ours", "deepcopy_half", "load_state_dict", "loop_copy", "foreach_copy")


def tensors(count: int, low: int, high: int) -> nn.Module:
    """`count` parameters of low to high elements, each in a module of its own, as in a model."""
    sizes = torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return nn.Sequential(*(nn.PReLU(n) for n in sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
    "bert": lambda: BertModel(BertConfig()),
    "tensors4000": lambda: tensors(4000, 400, 600),
    "tensors10000": lambda: tensors(10_000, 64, 64),
}


def ways(build: Callable[[], nn.Module], dtype: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """For each way, a function that sets it up and returns what is to be timed."""

    def ours() -> Callable[[], Any]:
        model = build()
        return MasterWeights(model, torch.optim.AdamW(model.parameters()), dtype).sync

    def deepcopy_half() -> Callable[[], Any]:
        model = build()
        return lambda: copy.deepcopy(model).to(DTYPES[dtype])

    def load_state_dict() -> Callable[[], Any]:
        model = build()
        half = copy.deepcopy(model).to(DTYPES[dtype])
        return lambda: half.load_state_dict(model.state_dict())

    def pairs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        masters = [p.detach() for p in build().parameters()]
        return [m.to(DTYPES[dtype]) for m in masters], masters

    def loop_copy() -> Callable[[], Any]:
        halves, masters = pairs()

        def loop() -> None:
            for half, master in zip(halves, masters, strict=True):
                half.copy_(master)

        return loop

    def foreach_copy() -> Callable[[], Any]:
        halves, masters = pairs()
        return lambda: torch._foreach_copy_(halves, masters)

    return dict(zip(WAYS, (ours, deepcopy_half, load_state_dict, loop_copy, foreach_copy), strict=True))


def give_back() -> None:
    """Return freed memory to the system (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 rounds, to try it out")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for model, build in MODELS.items():
        elements = sum(p.numel() for p in build().parameters())
        source, target = torch.ones(3 * elements // 4), torch.ones(3 * elements // 4)
        for dtype in DTYPES:
            for way, prepare in ways(build, dtype).items():
                work = prepare()
                # thousands of tensors make one call of these take seconds: fewer rounds tell as much
                slow = model.startswith("tensors") and way in ("deepcopy_half", "load_state_dict")
                count = min(rounds, 5) if slow else rounds
                name, copied = f"{model}/{dtype}/{way}", partial(target.copy_, source)
                if way == "deepcopy_half":
                    reused = compare(f"{name}, memory reused", work, copied, count)["ratio"]
                    row = compare(name, work, copied, count, give_back) | {"ratio_reused": reused}
                else:
                    row = compare(name, work, copied, count)
                row["elements"] = elements
                row["bytes_allocated"] = bytes_allocated(work)
                rows.append(row)
    found = {r["name"]: r for r in rows}

    def every(check: Callable[[str], bool]) -> bool:
        return all(check(dtype) for dtype in DTYPES)

    def faster(model: str, other: str, times: float) -> bool:
        return every(lambda d: found[f"{model}/{d}/{other}"]["ratio"] >= times * found[f"{model}/{d}/ours"]["ratio"])

    bars = [
        ("ours at most 1.15 on gpt2", every(lambda d: found[f"gpt2/{d}/ours"]["ratio"] <= 1.15)),
        ("ours at most 1.15 on tensors4000", every(lambda d: found[f"tensors4000/{d}/ours"]["ratio"] <= 1.15)),
        ("ours at least 6 times faster than deepcopy_half on gpt2", faster("gpt2", "deepcopy_half", 6)),
        (
            "ours at least 300 times faster than deepcopy_half on tensors4000",
            faster("tensors4000", "deepcopy_half", 300),
        ),
        ("ours at least 5 times faster than foreach_copy on tensors4000", faster("tensors4000", "foreach_copy", 5)),
        ("ours allocates 0 bytes", all(r["bytes_allocated"] == 0 for r in rows if r["name"].endswith("/ours"))),
        (
            "deepcopy_half shows at least 2 bytes per parameter",
            all(r["bytes_allocated"] >= 2 * r["elements"] for r in rows if r["name"].endswith("/deepcopy_half")),
        ),
    ]
    columns = {"name": "row", "ratio": "× one copy_", "ratio_reused": "memory reused", "ms": "ms"}
    columns["bytes_allocated"] = "bytes allocated"
    write(options.json, rows, bars, markdown(rows, columns))


if __name__ == "__main__":
    main()
