"""Latency: fair order, bounded time, keys; on a clock that only the fake models move."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from mptrain.core import host
from mptrain.measure import latency, throughput
from mptrain.recipe import Latency


class Clock:
    """Seconds pass only in models: `cost` per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int, tuple[int, ...]]] = []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(latency.time, "monotonic", lambda: self.now)

    def runner(self, **cost: float):
        def make(variant: str, threads: int):
            def forward(inputs: dict[str, np.ndarray]) -> None:
                self.calls.append((variant, threads, inputs["input_ids"].shape))
                self.now += cost[variant]

            return forward

        return make


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def example(batch: int, length: int) -> dict[str, list[list[int]]]:
    return {"input_ids": [[1] * length] * batch}


def test_grid_medians_and_keys(clock, monkeypatch):
    monkeypatch.setattr(host, "usable_cpus", lambda: 7)
    cfg = Latency(batch=[1, 8], length=[4, 16], threads=[1, "all"], runs=6)
    found = latency.latency(["a", "b"], clock.runner(a=0.2, b=0.4), example, cfg, budget_s=1e6)
    keys = {f"b{b}_s{s}_t{t}" for b in (1, 8) for s in (4, 16) for t in ("1", "all")}
    assert set(found["a"]) == set(found["b"]) == keys
    assert found["a"]["b8_s16_t1"] == {"median": pytest.approx(200), "min": pytest.approx(200), "runs": 6}
    assert found["b"]["b1_s4_tall"]["median"] == pytest.approx(400)
    assert {threads for _, threads, _ in clock.calls} == {1, 7}
    assert {shape for _, _, shape in clock.calls} == {(1, 4), (1, 16), (8, 4), (8, 16)}


def test_median_and_minimum_of_the_rounds(clock):
    seconds = iter([9, 9, 0.5, 0.2, 0.9, 0.3, 0.7])  # two warm-up calls, then five rounds

    def runner(variant: str, threads: int):
        def forward(inputs: dict[str, np.ndarray]) -> None:
            clock.now += next(seconds)

        return forward

    cfg = Latency(batch=[1], length=[4], threads=[1], runs=5)
    found = latency.latency(["a"], runner, example, cfg, budget_s=1e6)["a"]["b1_s4_t1"]
    assert found == {"median": pytest.approx(500), "min": pytest.approx(200), "runs": 5}


def test_no_variant_always_goes_first(clock):
    cfg = Latency(batch=[1], length=[4], threads=[1], runs=6)
    latency.latency(["a", "b", "c"], clock.runner(a=1, b=1, c=1), example, cfg, budget_s=1e6)
    order = [variant for variant, _, _ in clock.calls][6:]  # after two warm-up calls of each
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]


def test_calls_are_timed_as_one_of_a_stream(clock):
    cfg = Latency(batch=[1], length=[4], threads=[1], runs=5)
    cost = {"tiny": 0.0001, "small": 0.01, "a": 0.03, "b": 1.0}
    found = latency.latency([*cost], clock.runner(**cost), example, cfg, budget_s=1e6)
    calls = [variant for variant, _, _ in clock.calls]
    untimed = {"tiny": 10, "small": 3, "a": 1, "b": 0}  # 25 ms of calls, at most ten of them
    assert {variant: calls.count(variant) for variant in cost} == {v: 2 + (n + 1) * 5 for v, n in untimed.items()}
    assert found["a"]["b1_s4_t1"]["runs"] == found["b"]["b1_s4_t1"]["runs"] == 5


def test_budget_is_kept_with_at_least_five_rounds(clock):
    cfg = Latency(batch=[1], length=[4, 8], threads=[1], runs=50)
    found = latency.latency(["slow", "fast"], clock.runner(slow=4.0, fast=1.0), example, cfg, budget_s=100)["slow"]
    assert [row["runs"] for row in found.values()] == [9, 8]
    assert clock.now <= 100 + 5.0  # at most one round too many
    found = latency.latency(["slow", "fast"], clock.runner(slow=400.0, fast=1.0), example, cfg, budget_s=100)["fast"]
    assert [row["runs"] for row in found.values()] == [5, 5]


def test_fewer_rounds_than_five_are_taken_at_their_word(clock):
    cfg = Latency(batch=[1], length=[4], threads=[1], runs=2)
    assert latency.latency(["a"], clock.runner(a=9.0), example, cfg, budget_s=0)["a"]["b1_s4_t1"]["runs"] == 2


def test_images_have_no_length(clock):
    cfg = Latency(batch=[1, 2], length=[32, 128], threads=[1], runs=1)
    found = latency.latency(["a"], clock.runner(a=1.0), example, cfg, has_length=False)
    assert set(found["a"]) == {"b1_t1", "b2_t1"}


def test_collector_is_on_again_after_an_error():
    def runner(variant: str, threads: int):
        left = [None, None]

        def forward(inputs: dict[str, np.ndarray]) -> None:
            left.pop()

        return forward

    assert gc.isenabled()
    with pytest.raises(IndexError):
        latency.latency(["a"], runner, example, Latency(batch=[1], length=[4], threads=[1], runs=1))
    assert gc.isenabled()


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7571   32-Core
flags\t\t: fpu sse4_2 avx avx2 f16c fma bmi2 avx512_vnni_not

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


def test_flags_are_those_present():
    assert host.parse_cpuinfo(X86) == ("AMD EPYC 7571 32-Core", ["sse4_2", "avx", "avx2", "fma", "f16c"])
    assert host.parse_cpuinfo(ARM)[1] == ["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"]


def test_host_describes_this_machine():
    found = host.host()
    assert 1 <= found["cores_usable"] <= found["cores"]
    assert found["ram_bytes"] > 2**28
    assert all(isinstance(found[key], str) and found[key] for key in ("cpu", "os", "machine", "python"))
    present = Path("/proc/cpuinfo").read_text().split()
    assert found["cpu_flags"] and set(found["cpu_flags"]) <= set(present)


class Busy:
    """A stream on the clock: `cost` seconds to a call, with two requests at once half of it."""

    requests = 2

    def __init__(self, clock: Clock, cost: float) -> None:
        self.clock, self.cost, self.closed = clock, cost, False

    def __call__(self, batch: dict[str, np.ndarray], calls: int) -> None:
        self.clock.now += self.cost * calls / self.requests

    def close(self) -> None:
        self.closed = True


def test_throughput_counts_the_examples_of_all_requests(clock):
    streams = {"a": Busy(clock, 0.1), "b": Busy(clock, 0.4)}
    cfg = Latency(batch=[1, 8], length=[4], threads=[1], runs=3)
    found = throughput.throughput(["a", "b"], lambda variant, _: streams[variant], example, cfg)
    assert found["a"]["b8_s4_t1"] == {"median": pytest.approx(160), "max": pytest.approx(160), "requests": 2, "runs": 3}
    assert found["b"]["b1_s4_t1"]["median"] == pytest.approx(5) and set(found["b"]) == {"b1_s4_t1", "b8_s4_t1"}
    assert all(stream.closed for stream in streams.values())
