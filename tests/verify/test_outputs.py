"""Outputs that are compared: how many of them are held."""

import pytest
import torch

from mptrain.verify import outputs
from mptrain.verify.outputs import Kept


def test_outputs_beyond_a_bound_are_made_again(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT", 2 * 4 * 10)
    made = []

    def make(index):
        made.append(index)
        return {"logits": torch.full((10,), float(index))}

    kept = Kept(make, 4)
    assert [float(found["logits"][0]) for found in kept] == [0, 1, 2, 3] and len(kept) == 4
    assert kept[3] is kept[3] and kept[2]["logits"][0] == 2
    assert made == [0, 1, 2, 3]
    assert kept[0]["logits"][0] == 0 and kept[2]["logits"][0] == 2  # 3 had to go
    assert made == [0, 1, 2, 3, 0]
    assert [float(found["logits"][0]) for found in kept[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        kept[4]


def test_one_that_is_larger_than_the_bound_is_held_alone(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT", 1)
    kept = Kept(lambda index: {"logits": torch.zeros(10)}, 2)
    first = kept[0]
    assert kept[0] is first
    kept.keep(1, {"logits": torch.ones(3)})
    assert kept[1]["logits"].sum() == 3 and kept[0] is not first
