"""The proof of a block rejects what is not right; labels join what meets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kit.architectures import build, without_loss
from torch import nn

from mptrain.compress.structure.dataflow import examples, proof
from mptrain.compress.structure.dataflow.finder import find
from mptrain.compress.structure.dataflow.labels import CODES, Labels
from mptrain.compress.structure.dataflow.record import run
from mptrain.compress.structure.dataflow.stand_in import stand_in
from mptrain.compress.structure.dataflow.ways import Way, ways


def bench_of(model, slots, batch):
    inputs = examples.given(batch)[0]
    return proof.Bench(model, slots, [Way("", lambda: run(model, inputs), run(model, inputs))])


def shifted(block, role, number):
    """The block with one of its axes a unit further along."""
    axes = list(block.axes)
    places = [i for i, axis in enumerate(axes) if axis.role == role]
    if len(places) <= number:
        return None
    axis = axes[places[number]]
    axes[places[number]] = replace(axis, indices=np.roll(axis.indices, 1, axis=0))
    return replace(block, axes=tuple(axes))


NAMES = "bert gpt2 llama t5 bart swin segformer convnext resnet deberta-v2 wav2vec2 falcon".split()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_cut_is_rejected(name):
    model, batch = build(name)
    batch = without_loss(name, batch)
    blocks, _ = find(model, batch)
    with stand_in(model) as slots:
        bench = bench_of(model, slots, batch)
        assert bench.fault(blocks) is None
        wrong = [shifted(block, role, i) for block in blocks for role in ("source", "sink", "side") for i in range(3)]
        wrong = [block for block in wrong if block is not None]
        assert len(wrong) > len(blocks)
        right = {block.name: block for block in blocks}
        for block in wrong:
            assert bench.fault([block]) is not None or softmax_ignores(right[block.name], block)


def softmax_ignores(right, wrong):
    """The bias of the keys adds the same to all scores of a query: any cut of it is right."""
    changed = [a.parameter for a, b in zip(right.axes, wrong.axes) if a != b]
    return all("k" in name.split(".")[-2] and name.endswith("bias") for name in changed)


@pytest.mark.parametrize(("name", "attribute"), [("gpt2", "split_size"), ("opt", "num_heads")])
def test_a_missing_edit_is_rejected(name, attribute):
    model, batch = build(name)
    batch = without_loss(name, batch)
    block = find(model, batch)[0][0]
    less = replace(block, edits=tuple(edit for edit in block.edits if edit.attribute != attribute))
    assert len(less.edits) < len(block.edits)
    with stand_in(model) as slots:
        fault = bench_of(model, slots, batch).fault([less])
    assert fault is not None and ("does not run" in fault or "something else" in fault)


def test_a_unit_without_effect_is_no_proof():
    model, batch = build("bert")
    batch = without_loss("bert", batch)
    block = find(model, batch)[0][1]
    with stand_in(model) as slots:
        bench = bench_of(model, slots, batch)
        no_sinks = replace(block, axes=tuple(axis for axis in block.axes if axis.role != "sink"))
        assert "change nothing" in (bench.fault([no_sinks]) or "")


# -- ways to run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", ["", "on inputs of another size", "in training mode"]),
        ("gpt2", ["", "on inputs of another size", "with a cache", "in training mode"]),
        ("bart", ["", "on inputs of another size", "with a cache", "in training mode"]),
        ("resnet", ["", "on inputs of another size", "in training mode"]),
    ],
)
def test_a_proof_runs_the_model_in_every_way_it_has(name, expected):
    model, batch = build(name)
    inputs = examples.given(without_loss(name, batch))[0]
    with stand_in(model) as slots:
        buffers = {buffer: slots.now(buffer).clone() for buffer in slots.buffers}
        found = ways(model, slots, inputs, run(model, inputs))
        assert [way.name for way in found] == expected
        for way in found:
            assert all(torch.equal(a, b) for a, b in zip(way.run(), way.outputs, strict=True))
        assert all(torch.equal(slots.now(buffer), values) for buffer, values in buffers.items())
        assert not model.training


class Trained(nn.Module):
    """In training mode its first channels are counted on."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.up(x))
        return self.down(x + x[..., :1] if self.training else nn.functional.dropout(x, 0.5, self.training))


def test_a_block_that_is_another_in_training_is_left_out():
    blocks, refused = find(Trained(), {"x": torch.randn(3, 4)})
    assert not blocks and "in training mode, the smaller model computes something else" in refused[0].reason


# -- labels


def labels_of(**tensors):
    return Labels(tensors, tensors)


def test_labels_of_a_parameter_follow_its_geometry():
    weight = torch.randn(3, 4)
    labels = labels_of(weight=weight)
    expected = CODES + torch.arange(12).view(3, 4)
    assert torch.equal(labels.full(weight), expected)
    assert torch.equal(labels.full(weight.T[1:]), expected.T[1:])
    owner, at = labels.place(labels.full(weight)[:, 2])
    assert owner == 0 and at[0].tolist() == [0, 1, 2] and at[1].tolist() == [2, 2, 2]
    nodes, dim = labels.nodes_along(labels.full(weight[:1])[0])
    assert dim == 1 and nodes.tolist() == [3, 4, 5, 6]  # after the three rows


def test_labels_lie_on_storages():
    labels, x = labels_of(weight=torch.randn(2, 6)), torch.zeros(5, 6)
    labels.put(x, torch.arange(2, 8))
    assert labels.full(x.view(5, 2, 3).transpose(1, 2))[4].tolist() == [[2, 5], [3, 6], [4, 7]]
    labels.put(x[:, 4:], torch.tensor([-1, -1]))  # a write into a part
    assert labels.full(x)[0].tolist() == [2, 3, 4, 5, -1, -1]
    assert labels.of(torch.zeros(3)) is None


def test_what_meets_joins_and_parameters_are_attached():
    labels = labels_of(weight=torch.randn(4, 4), bias=torch.randn(4))
    rows, columns = torch.arange(4), torch.arange(4, 8)
    joined = labels.meet(rows, columns[[1, 0, 2, 2]])
    assert joined.tolist() == [0, 1, 2, 2]
    assert [labels.root(n) for n in range(8)] == [0, 1, 2, 2, 1, 0, 2, 7]
    labels.meet(joined, labels.full(torch.zeros(4)))  # a constant says nothing
    bias = CODES + 16 + torch.arange(4)
    assert labels.meet(bias, joined).tolist() == [0, 1, 2, 2]
    codes, nodes = labels.attached()
    assert list(zip(codes - CODES, nodes)) == [(16, 0), (17, 1), (18, 2), (19, 2)]


def test_along_joins_what_is_added_up():
    labels = labels_of(weight=torch.randn(6, 1))
    x = torch.arange(6).view(2, 3)
    assert labels.along(x, [1]).tolist() == [[0], [3]]
    assert labels.canonical(x).tolist() == [[0, 0, 0], [3, 3, 3]]
    assert labels.along(x.expand(4, 2, 3), [0])[0].tolist() == [[0, 0, 0], [3, 3, 3]]
