"""Training with AdamW's moments in 8 bits ends where AdamW in fp32 ends: GPT-2-like, BERT and ViT, over seeds.

    .venv/bin/python -m benchmarks.precision.moments --json benchmarks/results/moments.json
    … --rows bf16_split bf16_split_int8 bf16_split_int8_other bitsandbytes_fp32_8bit   # peers, in .venv-bench

Models, batches and settings of equivalence.py: 200 steps each, and 1,000 of the GPT-2. A seed is a start of its own and
batches of its own; a row is the relative difference to fp32 from the same start, with its sign: of the mean loss of
the last 20 steps (`ratio`: the mean over seeds), and of the loss on held-out batches, with the masters.

The BERT's rows show what can be told apart: fp32_nudged starts 1e-7 beside, so what it is off by is chaos; bf16_split
has fp32 moments, so what it is off by is bf16's doing; bf16_split_int8_other rounds codes otherwise, so where it and
bf16_split_int8 are off alike, on all seeds, that is a bias of the codes, and where not, chance. bitsandbytes and
torchao hold 8-bit states of fp32 weights; torchao's functions run as they are here, not compiled, and vectors that are
no whole blocks of 256 have fp32 states there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.kit.paired import markdown, write
from benchmarks.precision.equivalence import EPS, LR, MODELS, WINDOW, batch
from mptrain import MasterWeights
from mptrain.precision import moments8

BAR = 1e-3
CLOSEST = "bert", 200
"""its loss has just begun to fall at the end, where a difference in the steps shows most: all rows, all seeds"""
RUNS = (CLOSEST, ("gpt2", 200), ("vit", 200), ("gpt2", 1000))
OURS = ("bf16_split", "bf16_split_int8")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 12: 2.20, 16: 2.13}
"""Student's t of 95% intervals, by the number of seeds"""
ELSEWHERE = 1 << 20
"""steps from which bf16_split_int8_other takes its rounding"""


def adamw(model: nn.Module, lr: float) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=lr, eps=EPS)


def nudged(model: nn.Module, lr: float) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator).sign())
    return adamw(model, lr)


def masters(moments: Any) -> Callable[[nn.Module, float], Any]:
    return lambda model, lr: MasterWeights(model, adamw(model, lr), "bf16", "split", moments=moments)


def bitsandbytes_8bit(model: nn.Module, lr: float) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=lr, eps=EPS, min_8bit_size=1)


def torchao_8bit(model: nn.Module, lr: float) -> Any:
    from torchao.optim import AdamW8bit

    class All(AdamW8bit):  # type: ignore[misc]
        """Tensors below 4,096 values too, which torchao leaves in fp32: nearly all of these models."""

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            whole = p.numel() % self.block_size == 0
            return self._subclass_zeros(p, signed, self.block_size) if whole else torch.zeros_like(p)

    return All(model.parameters(), lr=lr, eps=EPS)


WAYS: dict[str, Callable[[nn.Module, float], Any]] = {
    "fp32": adamw,
    "fp32_nudged": nudged,
    "bf16_split": masters("fp32"),
    "bf16_split_int8": masters("int8"),
    "bf16_split_int8_other": masters("int8"),
    "bitsandbytes_fp32_8bit": bitsandbytes_8bit,
    "torchao_fp32_8bit": torchao_8bit,
}


@contextlib.contextmanager
def surroundings(way: str) -> Iterator[None]:
    here = moments8.turn
    with contextlib.ExitStack() as stack:
        if way == "bf16_split_int8_other":
            stack.enter_context(mock.patch.object(moments8, "turn", lambda name, step: here(name, step + ELSEWHERE)))
        if way == "torchao_fp32_8bit":
            stack.enter_context(mock.patch.object(torch, "compile", lambda f, **options: f))
        yield


def trained(name: str, steps: int, way: str, seed: int) -> tuple[list[float], float]:
    """(losses [steps], loss on held-out batches)."""
    torch.manual_seed(seed)
    model = MODELS[name]().train()
    optimizer = WAYS[way](model, LR[name])
    losses = []
    with surroundings(way):
        for number in range(steps):
            loss = model(**batch(name, 2000 * seed + number)).loss
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
    print(".", end="", flush=True)
    return losses, statistics.mean(held_out)


def spread(values: list[float]) -> dict[str, float]:
    """mean, half of its 95% interval, standard deviation, largest size."""
    deviation = statistics.stdev(values)
    reach = T95[len(values)] * deviation / len(values) ** 0.5
    return {"mean": statistics.mean(values), "reach": reach, "sd": deviation, "most": max(abs(v) for v in values)}


def rows_of(name: str, steps: int, ways: list[str], seeds: range) -> Iterator[dict[str, Any]]:
    ends: dict[str, list[float]] = {way: [] for way in ways}
    held: dict[str, list[float]] = {way: [] for way in ways}
    expected = [trained(name, steps, "fp32", seed) for seed in seeds]
    lasts = [statistics.mean(losses[-WINDOW:]) for losses, _ in expected]
    for way in ways:
        for seed, (_, evaluation), last in zip(seeds, expected, lasts, strict=True):
            losses, found = trained(name, steps, way, seed)
            ends[way].append(statistics.mean(losses[-WINDOW:]) / last - 1)
            held[way].append(found / evaluation - 1)
        end, evaluated = spread(ends[way]), spread(held[way])
        row: dict[str, Any] = {"name": f"{name}/{steps}/{way}", "seeds": len(seeds), "ratio": end["mean"], "bar": BAR}
        row |= {"end": end, "evaluation": evaluated, "ends": ends[way], "evaluations": held[way]}
        row |= {"fp32_first": statistics.mean(statistics.mean(losses[:WINDOW]) for losses, _ in expected)}
        row |= {"fp32_last": statistics.mean(lasts)}
        print(f"{row['name']:36s} end {said(end)}, evaluation {said(evaluated)}", flush=True)
        yield row


def said(of: dict[str, float]) -> str:
    return f"{of['mean']:+.1e} ± {of['reach']:.1e} (sd {of['sd']:.1e}, most {of['most']:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    without_peers = ["fp32_nudged", *OURS, "bf16_split_int8_other"]
    parser.add_argument(
        "--rows", nargs="+", choices=WAYS, default=without_peers, help="peers too, where they are installed"
    )
    parser.add_argument("--seeds", type=int, choices=T95, default=8, help="of the BERT; of others half of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fewer = range(max(2, options.seeds // 2))
    rows = [row for run in (CLOSEST,) for row in rows_of(*run, options.rows, range(options.seeds))]
    rows += [row for run in RUNS[1:] for row in rows_of(*run, [w for w in options.rows if w in OURS], fewer)]
    report(rows, options.json)


def report(rows: list[dict[str, Any]], path: Path) -> None:
    coded = [row[key] for row in rows if "bf16_split_int8" in row["name"] for key in ("end", "evaluation")]
    bars = [
        (
            "bf16_split_int8 ends within 0.1% of fp32 in the mean over seeds, evaluated too",
            all(abs(of["mean"]) <= BAR for of in coded),
        ),
        ("and with every seed", all(of["most"] <= BAR for of in coded)),
    ]
    shown = [
        {
            "name": row["name"],
            "seeds": row["seeds"],
            "fell": f"{row['fp32_first']:.3f} to {row['fp32_last']:.3f}",
            "end": said(row["end"]),
            "evaluation": said(row["evaluation"]),
        }
        for row in rows
    ]
    columns = {"name": "row", "seeds": "seeds", "fell": "fp32 loss, first and last window"}
    table = markdown(shown, columns | {"end": "last 20 steps", "evaluation": "evaluation"})
    said_first = "Relative differences to AdamW in fp32: mean over seeds ± 95% interval, standard deviation, largest."
    write(path, rows, bars, f"{said_first}\n\n{table}", plotted=None)


if __name__ == "__main__":
    main()
