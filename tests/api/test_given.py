"""Batches, data sets and examples as `mptrain.compress` and its like take them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mptrain.api.given import given, inputs_of
from mptrain.core.errors import DataError, UserError
from mptrain.recipe import TASKS
from mptrain.recipe.task import NO_TASK


class Rows(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"x": torch.full((3,), float(i)), "labels": i % 2}


class Net(torch.nn.Module):
    def forward(self, x, scale=None):
        return x


EXAMPLES = [Rows()[i] for i in range(20)]
BATCH = {"x": torch.arange(12.0).reshape(4, 3), "labels": torch.arange(4)}


@pytest.mark.parametrize(
    "data",
    [Rows(), [Rows()[i] for i in range(20)], DataLoader(Rows(), batch_size=7), [BATCH] * 3, BATCH, iter([BATCH])],
)
def test_data_of_every_kind_become_batches(data):
    found = given(data)
    batches = found.labelled(10)
    assert all(batch["x"].shape[1:] == (3,) and len(batch["labels"]) == len(batch["x"]) for batch in batches)
    rows, collate = found.dataset()
    assert collate([rows[0], rows[1]])["x"].shape == (2, 3)


def test_as_many_batches_are_read_as_are_needed():
    read = []

    class Counted(Rows):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    assert sum(len(batch["x"]) for batch in given(Counted()).labelled(9)) == 16
    assert max(read) == 15


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (3, "data: must be batches or a data set, got int"),
        ([torch.zeros(2, 3)], "name the inputs"),
        ([], "holds no batch"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(3)}, "as many examples each"),
        ({"x": [1, 2]}, "must hold tensors"),
    ],
)
def test_other_things_are_errors(data, expected):
    with pytest.raises(DataError, match=expected):
        given(data).labelled(4)


def test_batches_of_several_lengths_are_not_trained_on():
    with pytest.raises(DataError, match="examples of 2 sizes"):
        given([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}]).dataset()


def test_targets_are_left_out_and_other_names_refused():
    (kept,) = inputs_of(Net(), [BATCH], TASKS["text-classification"], "data")
    assert list(kept) == ["x"]
    with pytest.raises(UserError, match="calibration: Net takes no 'labels'; its forward takes x, scale"):
        inputs_of(Net(), [BATCH], NO_TASK, "calibration")
