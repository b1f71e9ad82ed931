"""What mptrain.Trainer costs with nothing enabled, against transformers.Trainer.

    .venv/bin/python -m benchmarks.precision.trainer_overhead --json benchmarks/results/trainer_overhead.json

Both train the same small BERT on the same batches in one process, in alternating rounds;
`ratio` is the median over rounds of ours / theirs, per optimizer step. Bar: at most 1.03.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from mptrain.core.host import host
from mptrain.flow.identity import versions
from mptrain.train.trainer import Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int, length: int) -> None:
        self.ids = torch.randint(0, 1000, (n, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": i % 2}


def seconds_per_step(cls: type, steps: int, folder: str) -> float:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
    )
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=50, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = cls(model, arguments, train_dataset=Rows(16 * steps, 32))
    trainer.remove_callback(transformers.PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios, ours, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            pair = {}
            order = (Trainer, transformers.Trainer) if number % 2 else (transformers.Trainer, Trainer)
            for cls in order:
                pair[cls] = seconds_per_step(cls, options.steps, folder)
            if number:  # the first round warms up
                ours.append(pair[Trainer])
                theirs.append(pair[transformers.Trainer])
                ratios.append(ours[-1] / theirs[-1])
    row = {
        "name": "mptrain.Trainer/nothing enabled",
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": options.rounds,
        "ms_per_step": {"mptrain": 1e3 * statistics.median(ours), "transformers": 1e3 * statistics.median(theirs)},
    }
    result = {"host": host(), "versions": versions(), "threads": 1, "rows": [row]}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
