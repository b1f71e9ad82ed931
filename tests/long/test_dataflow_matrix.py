"""Blocks of all the architectures there is a tiny model of: what is found is right on the model's own weights."""

import copy

import pytest
import torch
from kit.architectures import ARCHITECTURES, build, without_loss
from kit.structures import halved, zero_sinks

from mptrain.compress.structure.blocks import Structure
from mptrain.compress.structure.dataflow.finder import find
from mptrain.compress.structure.dataflow.record import run
from mptrain.compress.structure.shrink import shrink

pytestmark = pytest.mark.long

NONE = {"convnextv2", "mamba", "mamba2", "falcon_mamba"}
"""a norm over all channels between the matrices, or a scan that mixes them"""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_found_can_be_cut(name):
    model, batch = build(name)
    batch = without_loss(name, batch)
    blocks, refused = find(model.eval(), batch)
    assert bool(blocks) == (name not in NONE)
    structure = Structure(name, tuple(blocks), tuple(refused))
    if not blocks:
        return
    kept = halved(structure)
    masked = run(zero_sinks(copy.deepcopy(model), structure, kept), batch)
    shrunk = run(shrink(model, structure, kept), batch)
    for a, b in zip(shrunk, masked, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5 * scale, equal_nan=True)
