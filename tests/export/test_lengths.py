"""A model computes step by step where longer examples take more operations, not where what they hold does."""

from __future__ import annotations

import pytest
import torch
from kit.architectures import build
from torch import nn

from mptrain.core.signature import probed
from mptrain.export.torch import lengths


def padded() -> dict[str, torch.Tensor]:
    """Two rows of 16, whose first halves have no padding: attention is computed without a mask there."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    return {"input_ids": torch.arange(2, 34).view(2, 16), "attention_mask": mask}


def test_padding_is_no_step():
    model, example = build("bert")[0].eval(), padded()
    signature = probed(model, example)
    shorter, longer = lengths._others(example, signature)
    counts = [lengths._operations(model, batch, signature) for batch in (shorter, example, longer)]
    assert counts[0] < counts[1] == counts[2]
    assert not lengths.by_steps(model, example, signature)


class Steps(nn.Module):
    """most: the longest that it takes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.cell, self.most = nn.Linear(1, 1), most

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if input_ids.shape[1] > self.most:
            raise ValueError("too long")
        x = input_ids / 16
        state = torch.zeros(len(x), 1)
        for place in range(x.shape[1]):
            state = torch.tanh(self.cell(state) + x[:, place, None])
        return {"y": state}


@pytest.mark.parametrize("most", [32, 16])
def test_a_loop_over_the_tokens_is_seen_also_where_no_longer_example_is_taken(most):
    example = {"input_ids": torch.arange(32).view(2, 16)}
    model = Steps(most).eval()
    assert lengths.by_steps(model, example, probed(model, example))


def test_outputs_near_zero_are_not_taken_for_other_ones():
    """What is left of sums that nearly cancel differs by more than a rounding."""
    example = {"input_ids": torch.arange(32).view(2, 16)}
    model = Steps(32).eval()
    signature = probed(model, example)

    def graph(change):
        return lambda batch: {
            "y": model(**batch)["y"].detach().numpy() * (1 + change * (batch["input_ids"].shape[1] == 32))
        }

    assert lengths.wrong_length(graph(2e-4), model, example, signature) is None
    length, found = lengths.wrong_length(graph(1e-2), model, example, signature)
    assert length == 32 and found == pytest.approx(1e-2, rel=0.01)
