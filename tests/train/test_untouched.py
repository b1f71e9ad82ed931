"""A part that the loss does not depend on is named, once; a small one is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mptrain
from mptrain.train.untouched import Untouched


class Halves(nn.Module):
    """One of two layers is read."""

    def __init__(self, idle: int) -> None:
        super().__init__()
        self.read = nn.Linear(4, 40)
        self.idle = nn.Linear(4, idle)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": self.read(x).square().mean()}


@pytest.mark.parametrize("precision", ["fp32", "bf16-master", "bf16-split"])
@pytest.mark.parametrize(("idle", "said"), [(40, ["50%"]), (10, ["20%"]), (1, [])])
def test_what_gets_no_gradient_is_said_once(idle, said, precision, tmp_path, caplog):
    rows = [{"x": torch.ones(4), "labels": torch.tensor(0)}] * 8
    arguments = mptrain.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none", precision=precision
    )
    trainer = mptrain.Trainer(Halves(idle), arguments, train_dataset=rows, callbacks=[Untouched("a/train")])
    with caplog.at_level("WARNING", logger="mptrain"):
        trainer.train()
    lines = [r.message for r in caplog.records if "got no gradient" in r.message]
    assert len(lines) == len(said)
    for line, share in zip(lines, said):
        assert line.startswith(f"a/train: {share} of") and "(2 tensors, idle.weight first)" in line
