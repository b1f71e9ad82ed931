"""A short run of benchmarks/precision/equivalence.py: half with masters follows fp32, and half without does not."""

from __future__ import annotations

import pytest

from benchmarks.precision import equivalence


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_losses_follow_those_of_fp32(name):
    for row in equivalence.compare(name, steps=40, ways=("fp16", "bf16") if name == "bert" else ("bf16_split",)):
        assert row["ratio"] <= row["bar"] and row["evaluation"] <= row["bar"], row
        assert row["ratio"] < row["pure"] / 3, row
