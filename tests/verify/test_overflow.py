"""The search on programs made up for it; `test_fp16.py` runs it on models."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

from mptrain.core import progress
from mptrain.verify import overflow
from mptrain.verify.difference import of_tensors
from mptrain.verify.overflow import Op, compare, search


class Chain:
    """Ops in a row, each a function of the value before; ops in fp16 round what they read and make."""

    def __init__(self, functions, value):
        self.functions, self.value = functions, value
        names = [f"op{i}" for i in range(len(functions))]
        self.ops = [Op(n, "f", "", (names[i - 1],) if i else ()) for i, n in enumerate(names)]
        self.batches = 1

    def run(self, batch, keep, watch=None):
        x = self.value
        for op, function in zip(self.ops, self.functions, strict=True):
            x = function(x) if op.name in keep else function(x.half().float()).half().float()
            if watch is not None:
                watch(op.name, x)
        return {"out": x}

    def harm(self, batch, ops):
        found, x = {}, self.value
        for op, function in zip(self.ops, self.functions, strict=True):
            half, x = function(x.half().float()).half().float(), function(x)
            found[op.name] = of_tensors(x, half).error
        return found


class Wanted(Chain):
    """Right when the ops of one of the wanted sets are in fp32."""

    def __init__(self, size, *wanted):
        super().__init__([lambda x: x] * size, torch.ones(4))
        self.wanted = [{f"op{i}" for i in w} for w in wanted]

    def run(self, batch, keep, watch=None):
        good = any(w <= set(keep) for w in self.wanted)
        return {"out": self.value if good else 2 * self.value}


def test_nothing_is_kept_where_fp16_is_right():
    found = search(Chain([torch.sin, torch.exp], torch.linspace(-3, 3, 50)))
    assert found.keep == () and found.casts == 0 and found.reasons == {}
    assert found.before == found.after and 0 < found.before.error < 1e-2


def test_an_overflow_is_kept_up_to_where_the_value_is_small_again():
    functions = [lambda x: x * 300, lambda x: x**2, lambda x: x.mean(-1, True), torch.rsqrt, lambda x: x * 2]
    found = search(Chain(functions, torch.linspace(1, 3, 40).reshape(4, 10)))
    assert found.before.finite, "the reciprocal root of inf is 0, no NaN"
    assert not found.before.right() and found.before.cosine == 0
    assert found.keep == ("op1", "op2", "op3") and found.casts == 2
    assert found.after.error < 2e-3 and found.after.cosine > 0.99999
    assert found.ranges["op1"].largest == pytest.approx(900**2)
    assert found.ranges["op1"].overflow == pytest.approx(1 - 0, abs=0.1)
    assert found.reasons["op1"] == "largest |x| 8.1e+05"
    assert found.reasons["op3"].startswith("reads |x| up to 6.9"), "the largest mean of squares"


def test_harmful_underflow_is_kept_and_harmless_is_not():
    harmful = search(Chain([lambda x: x * 1e-9, lambda x: x * 1e9], torch.linspace(1, 2, 10)))
    assert harmful.keep == ("op0", "op1") and harmful.after.right() and harmful.casts == 0
    assert harmful.ranges["op0"].zero == 1 == harmful.ranges["op0"].subnormal
    harmless = search(Chain([torch.exp, lambda x: x + 1], torch.linspace(-100, 0, 50)))
    assert harmless.keep == () and harmless.ranges["op0"].zero > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_no_single_op_of_the_set_can_be_dropped(seed):
    draw = random.Random(seed)
    sets = [draw.sample(range(40), draw.randint(1, 4)) for _ in range(draw.randint(1, 3))]
    program = Wanted(40, *sets)
    found = search(program)
    assert found.after.right()
    assert set(found.keep) in program.wanted or all(
        not any(w <= set(found.keep) - {op} for w in program.wanted) for op in found.keep
    )
    assert list(found.keep) == sorted(found.keep, key=lambda n: int(n[2:]))
    assert found.runs < 120


class Layers(Chain):
    """In every layer, squares that overflow and their roots."""

    def __init__(self, layers, *values):
        super().__init__(
            [function for _ in range(layers) for function in (torch.square, torch.sqrt, torch.clone)], None
        )
        self.values, self.batches, self.made = values, len(values), 0
        self.ops = [Op(op.name, ("square", "sqrt", "scale")[i % 3], f"layers.{i // 3}", op.inputs)
                    for i, op in enumerate(self.ops)]  # fmt: skip

    def run(self, batch, keep, watch=None):
        self.value, self.made = self.values[batch], self.made + 1
        return super().run(batch, keep, watch)

    def harm(self, batch, ops):
        self.value, self.made = self.values[batch], self.made + 1
        return super().harm(batch, ops)


SMALL, LARGE = torch.linspace(1, 2, 20).reshape(2, 10), torch.linspace(300, 400, 20).reshape(2, 10)


def test_a_large_program_is_searched_in_few_runs():
    program = Layers(400, LARGE)
    found = search(program)
    assert len(program.ops) == 1200 and found.after.right()
    assert set(found.keep) == {op.name for op in program.ops if op.kind in ("square", "sqrt")}, "makes and reads 1.6e5"
    assert program.made == found.runs < 30
    assert found.note.startswith("operations that are alike were judged together")


def test_one_batch_is_searched_and_all_are_verified():
    """Each batch overflows in another op; the worst is searched, what the other needs comes on top."""

    class Either(Chain):
        def __init__(self):
            super().__init__([lambda x: x] * 12, torch.ones(4))
            self.made = [0, 0]
            self.batches = 2

        def run(self, batch, keep, watch=None):
            self.made[batch] += 1
            worse = 3.0 if batch else 2.0
            return {"out": self.value if {3: "op3", 2: "op7"}[int(worse)] in keep else worse * self.value}

    program = Either()
    found = search(program)
    assert found.keep == ("op3", "op7") and found.after.right() and found.note == ""
    assert program.made[0] < program.made[1], "the batch that fp16 changes most is tried first"


def test_a_search_that_is_stopped_returns_what_is_right_and_says_so():
    program = Layers(20, SMALL, LARGE)
    names = [op.name for op in program.ops]
    stopped = search(program, suspects=names, seconds=0)
    assert stopped.after.right() and stopped.note.startswith("the search was stopped after 0 s")
    whole = search(program, suspects=names)
    assert whole.note == "" and set(whole.keep) < set(stopped.keep)
    assert overflow.described(stopped)["note"] == stopped.note


def test_a_search_says_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.02)

    class Slow(Layers):
        def run(self, batch, keep, watch=None):
            time.sleep(0.05)
            return super().run(batch, keep, watch)

    with caplog.at_level("INFO", "mptrain.core.progress"):
        search(Slow(2, LARGE))
    assert any("fp16 search: run " in line and "operations in fp32" in line for line in caplog.messages)


def test_casts_are_counted_by_value():
    ops = [Op("a", "", "", ()), Op("b", "", "", ("a",)), Op("c", "", "", ("a",)), Op("d", "", "", ("b", "c"))]
    counts = {k: overflow.casts(ops, k) for n in range(3) for k in itertools.combinations("abcd", n)}
    assert counts[()] == 0
    assert counts[("a",)] == 1, "two readers share a cast"
    assert counts[("b",)] == 2 and counts[("b", "c")] == 3 and counts[("d",)] == 2


def test_differences():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.01]])
    assert compare({"x": a}, {"x": a}) == overflow.Difference(True, pytest.approx(1), 0, 0)
    off = compare({"x": a}, {"x": a + torch.tensor([[0.0, 0.5], [0.0, 0.0]])})
    assert off.max_diff == pytest.approx(0.5) and off.error == pytest.approx(0.1)
    assert off.cosine == pytest.approx(27.0001 / (25.0001 * 29.2501) ** 0.5, rel=1e-4)
    tiny = compare({"x": a}, {"x": a * torch.tensor([[1.0], [2.0]])})
    assert tiny.error < 0.01, "a row near 0 is measured by the size of the others"
    assert not compare({"x": a}, {"x": a * float("nan")}).finite
    infinite = torch.tensor([[1.0, -float("inf")]])
    assert compare({"x": infinite}, {"x": infinite}).right(), "what is infinite in fp32 too is not compared"
