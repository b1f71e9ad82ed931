"""The table that `prune.keep.latency` is computed from."""

from __future__ import annotations

import sys

import pytest
import torch
from kit.tiny_models import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mptrain.compress.structure import costs, latency
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.latency import measure_latency


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_it_covers_every_block(runtime, monkeypatch, caplog):
    if runtime == "torch":
        monkeypatch.setitem(sys.modules, "openvino", None)
    structure = find_structure(tiny("llama"))
    before = torch.get_rng_state()
    table = measure_latency(structure, 8, rounds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert ("timed in torch" in caplog.text) == (runtime == "torch")
    assert set(table) == {"attention/32/8/2", "ffn/32/2"}
    assert list(table["attention/32/8/2"]) == ["1", "2"]
    assert {"1", "48"} <= set(table["ffn/32/2"])
    assert all(seconds > 0 for points in table.values() for seconds in points.values())


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_what_is_timed_is_the_arithmetic_of_the_blocks(family):
    for block in find_structure(tiny(family)):
        one, x = latency._Residual(block, block.units), torch.randn(1, 8, 32)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            one(x)
        assert counter.get_total_flops() == 2 * costs.macs(block, block.units, 8)


def test_openvino_runs_what_torch_runs():
    block = find_structure(tiny("llama")).of_kind("heads")[0]
    torch.manual_seed(0)
    run = latency._runner(block, 2, costs.Extent(8, 8, 0), 1, 1)
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(latency._Residual(block, 2) for _ in range(latency.STACK)))
    with torch.no_grad():
        expected = stack(torch.randn(1, 8, 32))
    assert run()[0] == pytest.approx(expected.numpy(), abs=1e-5)
