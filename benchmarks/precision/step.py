"""One whole optimizer step on GPT-2, half gradients to half weights, ours against the peers.

    .venv-bench/bin/python -m benchmarks.precision.step --json benchmarks/results/step.json
    … --rows ours_split ours_int8 bitsandbytes_8bit torchao_8bit torchao_8bit_eager --rounds 5 \
        --json benchmarks/results/step_int8.json

Every row does the same work: are all gradients finite, their norm, unscale and clip to norm 1, AdamW on
fp32 weights, half weights. (torchao's optimizer has no fp32 weights: it rounds bf16 stochastically.)
ratio: time over one in-place pass that moves 30 bytes per parameter (15 read, 15 written), and for optimizers whose
moments have 8 bits 14 bytes: what an update reads and writes of a bf16 weight, its remainder, gradient and moments.
Their peers train bf16 weights with no fp32 ones; torchao rounds them stochastically, bitsandbytes to the nearest.
torchao compiles its step for every shape of a parameter; `eager` is the same without torch.compile. first_s: of these
two, wall seconds of the first step, in which that happens; what else runs on the machine is in them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.kit.paired import compare, markdown, write
from mptrain.precision import MasterWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SCALE, MAX_NORM = 1024.0, 1.0
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

Case = tuple[Callable[[], Any], Callable[[], Any] | None]
"""what is timed, and what prepares each call untimed"""


def shapes() -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in GPT2LMHeadModel(GPT2Config()).parameters()]


def random(dtype: torch.dtype, std: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) * std).to(dtype) for s in shapes()]


def gradients(dtype: str) -> list[Tensor]:
    return random(DTYPES[dtype], 1e-3 * SCALE)


def ours(dtype: str, kernel: Any, master: Any = "fp32", moments: Any = "fp32") -> Case:
    model = nn.ParameterList([nn.Parameter(w) for w in random(torch.float32, 0.02)])
    mw = MasterWeights(
        model, torch.optim.AdamW(model.parameters(), **SETTINGS), dtype, master,
        loss_scale=SCALE, max_grad_norm=MAX_NORM, kernel=kernel, moments=moments,
    )  # fmt: skip
    grads, no_loss = gradients(dtype), torch.zeros(())

    def backward_was_here() -> None:
        mw.scale(no_loss)  # a step refuses gradients of a loss that was not scaled
        for parameter, grad in zip(model, grads, strict=True):
            parameter.grad = grad

    return mw.step, backward_was_here


def lists(dtype: str, **options: Any) -> Case:
    """AdamW of torch over lists of tensors, and a list sync."""
    half, grads = random(DTYPES[dtype], 0.02), gradients(dtype)
    masters = [nn.Parameter(h.float()) for h in half]
    for master in masters:
        master.grad = torch.zeros_like(master)
    grads32 = [m.grad for m in masters]
    optimizer = torch.optim.AdamW(masters, **SETTINGS, **options)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(grads32, grads)
        torch._foreach_mul_(grads32, 1 / SCALE)
        norm = nn.utils.clip_grad_norm_(masters, MAX_NORM, foreach=True)
        if torch.isfinite(norm):
            optimizer.step()
            torch._foreach_copy_(half, masters)

    return step, None


def deepspeed_cpu_adam(dtype: str) -> Case:
    """As ZeRO-Offload uses it: one flat fp32 tensor, gradients converted, half weights copied back."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    elements = sum(s.numel() for s in shapes())
    grad = torch.cat([g.flatten() for g in gradients(dtype)])
    master = nn.Parameter(torch.cat([w.flatten() for w in random(torch.float32, 0.02)]))
    half = master.detach().to(DTYPES[dtype])
    master.grad = torch.zeros(elements)
    optimizer = DeepSpeedCPUAdam([master], adamw_mode=True, **SETTINGS)

    @torch.no_grad()
    def step() -> None:
        master.grad.copy_(grad)
        norm = torch.linalg.vector_norm(master.grad) / SCALE
        if torch.isfinite(norm):
            master.grad.mul_(min(1.0, MAX_NORM / (float(norm) + 1e-6)) / SCALE)
            optimizer.step()
            half.copy_(master)

    return step, None


def torchao_stochastic_rounding(dtype: str) -> Case:
    from torchao.optim import _AdamW

    return half_weights(dtype, lambda weights: _AdamW(weights, **SETTINGS, bf16_stochastic_round=True))


def torchao_8bit(dtype: str) -> Case:
    from torchao.optim import AdamW8bit

    return half_weights(dtype, lambda weights: AdamW8bit(weights, **SETTINGS, bf16_stochastic_round=True))


def torchao_8bit_eager(dtype: str) -> Case:
    step, before = torchao_8bit(dtype)

    def eager() -> None:
        with mock.patch.object(torch, "compile", lambda function, **options: function):
            step()

    return eager, before


def bitsandbytes_8bit(dtype: str) -> Case:
    from bitsandbytes.optim import AdamW8bit

    return half_weights(dtype, lambda weights: AdamW8bit(weights, **SETTINGS))


def half_weights(dtype: str, optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Case:
    """An optimizer that trains half weights, with nothing in fp32 beside them."""
    weights = [nn.Parameter(w) for w in random(DTYPES[dtype], 0.02)]
    grads = gradients(dtype)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    own = [w.grad for w in weights]
    optimizer = optimizer_of(weights)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(own, 1 / SCALE)
        norm = nn.utils.clip_grad_norm_(weights, MAX_NORM, foreach=True)
        if torch.isfinite(norm):
            optimizer.step()

    return step, lambda: torch._foreach_copy_(own, grads)


ROWS: dict[str, tuple[tuple[str, ...], Callable[[str], Case]]] = {
    "ours_torch": (("fp16", "bf16"), lambda d: ours(d, "torch")),
    "ours_native": (("fp16", "bf16"), lambda d: ours(d, "native")),
    "ours_split": (("bf16",), lambda d: ours(d, "native", "split")),
    "ours_int8": (("bf16",), lambda d: ours(d, "native", "split", "int8")),
    "fused_list_sync": (("fp16", "bf16"), lambda d: lists(d, fused=True)),
    "foreach_list": (("fp16", "bf16"), lambda d: lists(d, foreach=True)),
    "deepspeed_cpu_adam": (("fp16", "bf16"), deepspeed_cpu_adam),
    "torchao_bf16_stochastic_round": (("bf16",), torchao_stochastic_rounding),
    "torchao_8bit": (("bf16",), torchao_8bit),
    "torchao_8bit_eager": (("bf16",), torchao_8bit_eager),
    "bitsandbytes_8bit": (("bf16",), bitsandbytes_8bit),
}
EIGHT = ("ours_int8", "bitsandbytes_8bit", "torchao_8bit", "torchao_8bit_eager")
"""rows whose moments have 8 bits, compared with a pass of 14 bytes a parameter; the others with one of 30"""


COMPILING = ("torchao_8bit", "torchao_8bit_eager")


def first_step(work: Callable[[], Any], before: Callable[[], Any] | None) -> float:
    if before is not None:
        before()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="3 rounds, to try it out")
    whole = [row for row in ROWS if row not in EIGHT]
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=whole, help="only these; default: all with fp32 moments"
    )
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elements = sum(s.numel() for s in shapes())
    streams = {size: torch.rand(size // 2 * elements // 4) for size in (30, 14)}
    rows = []
    for name in options.rows:
        dtypes, build = ROWS[name]
        for dtype in dtypes:
            work, before = build(dtype)
            size = 14 if name in EIGHT else 30
            stream = streams[size]
            first = first_step(work, before) if name in COMPILING else None
            rows.append(compare(f"gpt2/{dtype}/{name}", work, lambda s=stream: s.mul_(1.0000001), rounds, before))
            rows[-1] |= {"elements": elements, "stream": size} | ({"first_s": first} if first is not None else {})
            del work, before
    ratio = {r["name"]: r["ratio"] for r in rows}

    def at_most(row: str, bar: float) -> bool:
        return all(r <= bar for n, r in ratio.items() if n.endswith(row))

    bars = []
    if "ours_int8" in options.rows:
        bars = [("ours_int8 at most 1.2 passes of 14 bytes", at_most("ours_int8", 1.2))]
    elif options.rows == whole:
        peers = [r for r in whole if not r.startswith("ours_")]
        best = {d: min(v for n, v in ratio.items() if "/ours_" in n and f"/{d}/" in n) for d in DTYPES}
        bars = [
            ("ours_torch at most 2.1", at_most("ours_torch", 2.1)),
            ("ours_native at most 1.25", at_most("ours_native", 1.25)),
            ("ours_split at most 1.3", at_most("ours_split", 1.3)),
            (
                "ours_native at least 1.5 times faster than fused_list_sync",
                all(ratio[f"gpt2/{d}/fused_list_sync"] >= 1.5 * ratio[f"gpt2/{d}/ours_native"] for d in DTYPES),
            ),
            (
                "ahead of every peer",
                all(v > best[n.split("/")[1]] for n, v in ratio.items() if n.split("/")[2] in peers),
            ),
        ]
    columns = {"name": "row", "ratio": "× one pass", "stream": "of bytes a parameter", "ms": "ms"}
    if set(options.rows) & set(COMPILING):
        columns["first_s"] = "first step, s"
    write(options.json, rows, bars, markdown(rows, columns))


if __name__ == "__main__":
    main()
