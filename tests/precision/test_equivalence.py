"""A short run of benchmarks/precision/equivalence.py: half with masters follows fp32, and half without does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.precision import equivalence, moments


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_losses_follow_those_of_fp32(name):
    for row in equivalence.compare(name, steps=40, ways=("fp16", "bf16") if name == "bert" else ("bf16_split",)):
        assert row["ratio"] <= row["bar"] and row["evaluation"] <= row["bar"], row
        assert row["ratio"] < row["pure"] / 3, row


def test_losses_with_moments_of_8_bits_follow_those_of_fp32():
    expected = equivalence.train("gpt2", 40)
    losses, held_out = moments.trained("gpt2", 40, "bf16_split_int8", seed=0)
    windows, evaluation = equivalence.difference((torch.tensor(losses), held_out), expected)
    assert max(windows) <= 3e-4 and evaluation <= 3e-4 and min(windows) > 0
