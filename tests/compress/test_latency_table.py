"""The table that `prune.keep.latency` is computed from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kit.tiny_models import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mptrain.compress.runtime import Torch
from mptrain.compress.structure import costs, latency
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.latency import measure_latency


def test_it_covers_every_block():
    structure = find_structure(tiny("llama"))
    before = torch.get_rng_state()
    table, steps = measure_latency(structure, 8, Torch(), rounds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(table) == {"attention/32/8/2", "ffn/32/2"} and steps == {}
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


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        (lambda n: n, 1),
        (lambda n: n if n % 64 == 0 else n + 80, 64),
        (lambda n: n if n % 32 == 0 else n + 40, 32),
        (lambda n: n if n % 16 == 0 else 1.1 * n, 16),
        (lambda n: n if n % 16 == 0 else n + 8, 1),  # no faster, only no slower
    ],
)
def test_widths_are_a_multiple_of_what_is_faster(seconds, step):
    assert latency._fast_step([(n, seconds(n)) for n in range(704, 769, 8)]) == step


def test_widths_near_half_are_timed_one_by_one():
    (block, *_) = find_structure(tiny("bert")).of_kind("ffn")
    wide = replace(block, units=1536)
    assert latency._comb(wide, 8) == list(range(704, 769, 8)) and latency._comb(wide, 1) == latency._comb(wide, 8)
    assert latency._comb(wide, 16) == [704, 720, 736, 752, 768]
    assert latency._comb(wide, 64) == latency._comb(block, 8) == []
    assert set(latency._comb(wide, 8)) < set(latency._points(wide, 8))
