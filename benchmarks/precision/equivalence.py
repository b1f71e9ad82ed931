"""Training in half precision with masters ends where fp32 training ends: GPT-2-like, BERT and ViT.

    .venv/bin/python -m benchmarks.precision.equivalence --json benchmarks/results/equivalence.json

Tiny random models (half-precision matrix products are very slow on a CPU), dropout 0, the same batches in the
same order, AdamW, 200 steps. ratio: the largest relative difference to fp32 over windows of 20 steps of the mean
loss. `evaluation`: that of the loss on held-out batches at the end, computed in fp32 with the masters (without
masters: the half weights). `pure`: the same without masters. Then two ranks against one with accumulation.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.kit.paired import markdown, write
from mptrain import LossScale, MasterWeights

WINDOW = 20
VOCABULARY, LENGTH = 64, 16
BATCH = {"gpt2": 8, "bert": 8, "vit": 32}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **GPT2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SMALL, **NO_DROPOUT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL, **NO_DROPOUT)),
}
WAYS = {"fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32"), "bf16_split": ("bf16", "split")}
BARS = {"fp16": 1e-3, "bf16": 5e-3}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LR = {"gpt2": 3e-4, "bert": 3e-4, "vit": 1e-4}
EPS = 1e-6  # fp16 has no 1e-8, the default
SCALE = LossScale(init=2.0**12)  # from the default of 2^16 the first steps would be skipped, and the data shifted
MICRO = 4


def batch(name: str, number: int) -> dict[str, Tensor]:
    """Tasks whose loss cannot fall to zero, where a relative difference would mean nothing."""
    generator = torch.Generator().manual_seed(number)
    rows = BATCH[name]
    if name == "gpt2":
        rare = 1 / torch.arange(1.0, VOCABULARY + 1)
        ids = torch.multinomial(rare, rows * LENGTH, replacement=True, generator=generator).view(rows, LENGTH)
        return {"input_ids": ids, "labels": ids}
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    truth = ids[:, 0] >= VOCABULARY // 2
    labels = (truth ^ (torch.rand(rows, generator=generator) < 0.3)).long()  # 30% of the labels are wrong
    if name == "bert":
        return {"input_ids": ids, "labels": labels}
    pixels = torch.randn(rows, 3, 8, 8, generator=generator) + 0.5 * truth.view(rows, 1, 1, 1)
    return {"pixel_values": pixels, "labels": labels}


def train(name: str, steps: int, way: str | None = None, pure: str | None = None) -> tuple[Tensor, float]:
    """(losses [steps], loss on held-out batches): in fp32, with masters (`way`), or half without masters (`pure`)."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if pure:
        model.to(DTYPES[pure])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[name], eps=EPS)
    mw = MasterWeights(model, optimizer, *WAYS[way], loss_scale=SCALE if way == "fp16" else None) if way else None
    losses = []
    for number in range(steps):
        inputs = batch(name, number)
        if pure:
            inputs = {k: v.to(DTYPES[pure]) if v.is_floating_point() else v for k, v in inputs.items()}
        loss = model(**inputs).loss
        losses.append(loss.item())
        if mw is not None:
            mw.backward(loss)
            mw.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert mw is None or mw.skipped_steps == 0
    plain = (mw.release() if mw is not None else copy.deepcopy(model).float()).eval()
    with torch.no_grad():
        held_out = [plain(**batch(name, 1_000_000 + i)).loss.item() for i in range(16)]
    return torch.tensor(losses), sum(held_out) / len(held_out)


def difference(found: tuple[Tensor, float], expected: tuple[Tensor, float]) -> tuple[list[float], float]:
    """Relative differences: mean loss of every window of steps, and held-out loss; inf when not finite."""
    means = [losses.view(-1, WINDOW).mean(1) for losses in (found[0], expected[0])]
    windows = ((means[0] - means[1]) / means[1]).abs().nan_to_num(math.inf).tolist()
    held_out = abs(found[1] / expected[1] - 1)
    return windows, held_out if math.isfinite(held_out) else math.inf


def compare(name: str, steps: int, ways: tuple[str, ...] = tuple(WAYS)) -> list[dict[str, Any]]:
    """One row for each way to train with masters."""
    expected = train(name, steps)
    pure = {dtype: difference(train(name, steps, pure=dtype), expected) for dtype in {WAYS[w][0] for w in ways}}
    rows = []
    for way in ways:
        windows, held_out = difference(train(name, steps, way), expected)
        pure_windows, pure_held_out = pure[WAYS[way][0]]
        rows.append(
            {
                "name": f"{name}/{way}/masters",
                "ratio": max(windows),
                "min": min(windows),
                "max": max(windows),
                "rounds": len(windows),
                "evaluation": held_out,
                "fp32_first": expected[0][:WINDOW].mean().item(),
                "fp32_last": expected[0][-WINDOW:].mean().item(),
                "pure": max(pure_windows),
                "pure_evaluation": pure_held_out,
                "bar": BARS[WAYS[way][0]],
            }
        )
        row = rows[-1]
        print(f"{row['name']:26s} {row['ratio']:.1e} evaluation {held_out:.1e}", end=" ")
        print(f"(pure {row['pure']:.1e}, {pure_held_out:.1e})", flush=True)
    return rows


def steps_on_ranks(rank: int, ranks: int, way: str, steps: int) -> list[float]:
    """Mean loss of each optimizer step of MICRO micro-batches, dealt out to the ranks; the same on every rank."""
    torch.manual_seed(0)
    model: nn.Module = MODELS["bert"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR["bert"], eps=EPS)
    mw = MasterWeights(model, optimizer, *WAYS[way], loss_scale=SCALE if way == "fp16" else None)
    if ranks > 1:
        model = DistributedDataParallel(model, find_unused_parameters=False)
        mw.attach(model)
    losses = []
    for step in range(steps):
        total = torch.zeros(())
        own = range(MICRO * step + rank, MICRO * (step + 1), ranks)
        for number in own:
            if ranks > 1:
                model.require_backward_grad_sync = number == own[-1]
            loss = model(**batch("bert", number)).loss
            mw.backward(loss / len(own))
            total += loss.detach() / MICRO
        mw.step()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def rank(number: int, ranks: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(minutes=5), ranks, number)
    found = {way: steps_on_ranks(number, ranks, way, steps) for way in WAYS}
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def compare_ranks(steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (2, folder, steps), nprocs=2)
        two = torch.load(f"{folder}/0.pt", weights_only=True)
    rows = []
    for way in WAYS:
        one = steps_on_ranks(0, 1, way, steps)
        off = [abs(a / b - 1) for a, b in zip(two[way], one, strict=True)]
        rows.append({"name": f"bert/{way}/2_ranks", "ratio": max(off), "min": min(off), "max": max(off)})
        rows[-1] |= {"rounds": steps, "bar": 1e-5}
        print(f"{rows[-1]['name']:26s} {max(off):.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {WINDOW}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [row for name in MODELS for row in compare(name, options.steps)]
    apart = compare_ranks(40)
    bars = [
        (
            f"{dtype}: losses and the evaluation loss within {100 * bar:g}% of fp32",
            all(r["ratio"] <= bar and r["evaluation"] <= bar for r in rows if f"/{dtype}" in r["name"]),
        )
        for dtype, bar in BARS.items()
    ]
    fifth = all(5 * r["ratio"] <= r["pure"] and 5 * r["evaluation"] <= r["pure_evaluation"] for r in rows)
    bars.append(("at most a fifth of the difference without masters", fifth))
    bars.append(("two ranks are one with accumulation within 1e-5", all(r["ratio"] <= r["bar"] for r in apart)))
    keys = ("ratio", "min", "max", "evaluation", "pure", "pure_evaluation")
    shown = [{k: f"{v:.1e}" if k in keys else v for k, v in r.items()} for r in rows + apart]
    for row in shown[: len(rows)]:
        row["fell"] = f"{row['fp32_first']:.3f} to {row['fp32_last']:.3f}"
    columns = {"name": "row", "fell": "fp32 loss, first and last window"}
    columns |= {"ratio": "loss", "evaluation": "evaluation loss", "pure": "loss without masters"}
    table = markdown(shown, columns | {"pure_evaluation": "evaluation loss without masters"})
    finite = [{k: v if v != math.inf else None for k, v in r.items()} for r in rows + apart]  # JSON has no infinity
    write(
        options.json,
        finite,
        bars,
        f"Relative differences to fp32 training.\n\n{table}",
        plotted=None,
        steps=options.steps,
    )


if __name__ == "__main__":
    main()
