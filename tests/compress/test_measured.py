"""Budgets of the whole exported model: predicted from measurements, measured after the choice, then corrected."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from kit.architectures import build, without_loss
from kit.tiny_models import inputs, tiny

from mptrain.compress.base import Site, Tools
from mptrain.compress.methods import method_class
from mptrain.compress.prune import measured
from mptrain.compress.runtime import Torch, in_turns, seconds, share
from mptrain.compress.structure.budget import Widths
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import UserError
from mptrain.recipe import Keep, Magnitude


class Clock:
    """A target whose time and size are functions of the weights. bend: of whole models, which blocks alone lack."""

    words = "a clock"

    def __init__(self, bend: float = 0.0, rest: float = 0.0) -> None:
        self.bend, self.rest, self.count = bend, rest, 0

    def compiled(self, model, example):
        self.count += 1
        weights = sum(p.numel() for n, p in model.named_parameters() if "encoder" in n or "blocks" in n)
        whole = hasattr(model, "classifier")
        bent = weights + self.bend * weights * (1 - weights / ALL) if whole else weights
        return Fixed(bent + self.rest * whole, 4 * sum(p.numel() for p in model.parameters()))


class Fixed:
    def __init__(self, time, size):
        self.time, self.bytes, self.open = time, size, True

    def seconds(self):
        assert self.open
        return self.time

    def close(self):
        self.open = False


ALL = sum(p.numel() for n, p in tiny("bert").named_parameters() if "encoder" in n)


def pruned(keep, target, model=None, whole=None):
    """A pruned model, its facts and what was measured, as a run keeps it. whole: what the budget counts against."""
    torch.manual_seed(0)
    config = Magnitude(method="magnitude", keep=Keep(**keep), min_ffn=1, round_ffn=1)
    method = method_class(config)(config)
    kept = {}

    def once(name, make):
        return json.loads(kept.setdefault(name, json.dumps(make())))

    against = None if whole is None else lambda: whole
    tools = Tools(example=lambda: inputs("bert", batch=1), runtime=lambda: target, once=once, whole=against)
    made = method.finalize(method.prepare(model or tiny("bert"), tools), tools)
    return made, method.facts()["budget"], kept


@pytest.mark.parametrize("rest", [0, 0.2 * ALL])
def test_a_latency_is_a_share_of_the_whole_model(rest):
    made, facts, kept = pruned({"latency": 0.5}, Clock(rest=rest))
    left = sum(p.numel() for n, p in made.named_parameters() if "encoder" in n)
    assert (left + rest) / (ALL + rest) == pytest.approx(facts["measured"]) == pytest.approx(0.5, abs=0.01)
    assert facts["corrected"] is None and not any("corrected" in name for name in kept)
    assert facts["predicted"] == pytest.approx(facts["measured"], abs=0.005)
    assert facts["of"] == "latency" and facts["asked"] == 0.5 and facts["target"] == "a clock"


def test_what_misses_is_corrected(caplog):
    """Between the two models that are measured before, the whole one costs more than its blocks say."""
    target = Clock(bend=0.3)
    _, facts, kept = pruned({"latency": 0.5}, target)
    assert facts["corrected"] > 0.53 and facts["measured"] == pytest.approx(0.5, abs=0.02)
    assert set(kept) == {"start", "latency", "latency-chosen", "latency-corrected-1"}
    assert "is left" not in caplog.text


def test_a_correction_that_makes_it_worse_is_left(monkeypatch, caplog):
    found = iter([0.3, 0.53, 0.9, 0.8, 0.2])  # of the least, of the choice, of the corrected ones
    monkeypatch.setitem(measured.READ, "latency", lambda one, dense: next(found))
    _, facts, _ = pruned({"latency": 0.5}, Clock())
    assert facts["measured"] == 0.53 and facts["corrected"] is None
    assert "but 0.53 is left" in caplog.text


def test_a_correction_that_overshoots_is_corrected_again(monkeypatch):
    """Time that is steep near the budget: too little was left, by that factor too much; what lies between is near."""

    def read(one, dense):
        share = one.time / dense.time
        return share + 0.08 * math.tanh((share - 0.5) / 0.03) if share > 0.3 else share

    monkeypatch.setitem(measured.READ, "latency", read)
    _, facts, kept = pruned({"latency": 0.47}, Clock())
    assert kept["latency-chosen"] == json.dumps(facts["corrected"]) and facts["corrected"] < 0.42
    assert float(kept["latency-corrected-1"]) > 0.52
    assert facts["measured"] == pytest.approx(0.47, rel=0.02)


def test_noise_on_a_budget_of_all_of_it_cuts_nothing(monkeypatch):
    found = iter([0.3, 1.04])  # of the least, of the whole
    monkeypatch.setitem(measured.READ, "latency", lambda one, dense: next(found))
    made, facts, _ = pruned({"latency": 1.0}, Clock())
    assert facts["corrected"] is None and made.num_parameters() == tiny("bert").num_parameters()


def test_what_was_kept_is_measured_no_more():
    """Other processes, and a run that was stopped, take what one has measured."""
    made, facts, kept = pruned({"latency": 0.5}, Clock(bend=0.3))
    config = Magnitude(method="magnitude", keep=Keep(latency=0.5), min_ffn=1, round_ffn=1)
    method = method_class(config)(config)
    other = Clock()
    tools = Tools(
        example=lambda: inputs("bert", batch=1), runtime=lambda: other, once=lambda name, make: json.loads(kept[name])
    )
    again = method.finalize(method.prepare(tiny("bert"), tools), tools)
    assert other.count == 0 and method.facts()["budget"] == facts
    assert [p.shape for p in again.parameters()] == [p.shape for p in made.parameters()]


def test_a_budget_against_another_model_is_a_share_of_that():
    """What misses does not add up from point to point: each is measured against where the family starts."""
    target = Clock(rest=0.1 * ALL)
    half, _, _ = pruned({"latency": 0.5}, target)
    made, facts, kept = pruned({"speedup": 3.0}, target, copy.deepcopy(half), tiny("bert"))
    left = sum(p.numel() for n, p in made.named_parameters() if "encoder" in n)
    assert (left + 0.1 * ALL) / (1.1 * ALL) == pytest.approx(facts["measured"]) == pytest.approx(1 / 3, abs=0.01)
    assert facts["asked"] == pytest.approx(1 / 3) and facts["start"] == pytest.approx(0.5, abs=0.01) and "start" in kept
    whole, facts, _ = pruned({"latency": 0.6}, target, half, tiny("bert"))  # it is there already
    assert facts["measured"] == facts["start"] and whole.num_parameters() == half.num_parameters()


@pytest.mark.parametrize("target", [Clock(), Torch()])
def test_a_size_is_that_of_the_file(target):
    made, facts, _ = pruned({"size": 0.6}, target)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (made, tiny("bert"))]
    assert sizes[0] / sizes[1] == pytest.approx(facts["measured"]) == pytest.approx(0.6, abs=0.01)


def test_what_cannot_be_reached_is_refused_before_training():
    skeleton = tiny("bert").to("meta")
    config = Magnitude(method="magnitude", keep=Keep(size=0.1), min_ffn=1, round_ffn=1)
    with pytest.raises(UserError, match=r"keep\.size: 0\.1 cannot be reached.*at least 0\.\d+ stays"):
        method_class(config).check(config, skeleton, Site("prune", 8, bytes=(4.0, 4.0)))
    method_class(config).check(config, skeleton, Site("prune", 8))  # nothing known of its bytes
    floor = method_class(config)(Magnitude(method="magnitude", keep=Keep(latency=0.5), min_heads=4, min_ffn=48))
    with pytest.raises(UserError, match=r"keep\.latency: 0\.5 cannot be reached.*at least 1 stays"):
        floor.prepare(tiny("bert"), Tools(example=lambda: inputs("bert", batch=1), runtime=Clock))
    with pytest.raises(UserError, match=r"keep\.latency: 0\.1 cannot be reached.*of it embeddings, norms and head"):
        pruned({"latency": 0.1}, Clock(rest=ALL))


def test_blocks_that_cannot_be_timed_are_refused_before_training():
    config = Magnitude(method="magnitude", keep=Keep(latency=0.5))
    model, batch = build("resnet")
    with pytest.raises(UserError, match=r"keep\.latency: .* holds channels of convolutions"):
        method_class(config).check(config, model, Site("prune", example=without_loss("resnet", batch)))


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_bytes_by_formula_are_those_of_files(name):
    """Also where two convolutions cut one weight, and what they leave is less than the sum of their shares."""
    model, batch = build(name)
    batch = without_loss(name, batch)
    structure, widths = find_structure(model, batch), Widths()
    found = measured.from_bytes(model, structure, (4.0, 4.0))
    whole = measured.measure(model, structure, batch, Clock(), budget="size", extents=8, widths=widths)
    # running means are in the blocks, and are no parameters
    near = 1e-6 if name == "bert" else 0.06
    assert (found.scale, found.constant) == (
        pytest.approx(whole.scale, rel=near),
        pytest.approx(whole.constant, abs=near),
    )


def test_times_are_taken_in_turns():
    calls = []

    class Told(Fixed):
        def seconds(self):
            calls.append(self.time)
            return self.time

    a, b = Told(1.0, 0), Told(2.0, 0)
    assert in_turns([a, b], 2, "", warm=False) == [[1.0, 1.0], [2.0, 2.0]]
    assert calls == [1.0, 2.0, 1.0, 2.0, 2.0, 1.0]
    assert share(b, a, 3, "") == 2.0
    calls.clear()
    small = Told(0.01, 0)
    assert in_turns([small, b], 2, "") == [[0.01, 0.01], [2.0, 2.0]]
    assert calls.count(0.01) == 2 + 2 * (3 + 1) and calls.count(2.0) == 2 + 2  # 25 ms of untimed calls, and none


def test_a_call_that_waits_counts_what_it_computed(monkeypatch):
    wall, cpu = iter([0.0, 5.0, 0.0, 1.0]), iter([0.0, 2.0, 0.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(wall))
    monkeypatch.setattr("time.process_time", lambda: next(cpu))
    assert seconds(lambda: None) == 2.0  # one thread, which waited
    assert seconds(lambda: None) == 1.0  # four threads


def test_a_family_measures_its_blocks_once():
    """A later point takes the times of the first, in parts of where it starts itself; another model's it does not."""
    kept: dict[str, str] = {}

    def shared(name, make):
        if name not in kept:
            kept[name] = json.dumps(make())
        return json.loads(kept[name])

    def point(keep, target, model, whole=None, counted="dense"):
        before = target.count
        config = Magnitude(method="magnitude", keep=Keep(**keep), min_ffn=1, round_ffn=1)
        method = method_class(config)(config)
        tools = Tools(
            example=lambda: inputs("bert", batch=1), runtime=lambda: target, shared=shared, counted=counted,
            whole=None if whole is None else lambda: whole,
        )  # fmt: skip
        made = method.finalize(method.prepare(model, tools), tools)
        return made, method.facts()["budget"], target.count - before

    target = Clock(rest=0.1 * ALL)
    half, _, exported = point({"speedup": 2.0}, target, tiny("bert"))
    assert exported > 10 and len(kept) == 1
    for counted, times in (("dense", 1), ("another", 2)):
        third, facts, exported = point({"speedup": 3.0}, target, copy.deepcopy(half), tiny("bert"), counted)
        assert len(kept) == times
        # start and whole, then the choice beside the start; of another model its blocks too
        assert (exported == 4) == (counted == "dense")
        left = sum(p.numel() for n, p in third.named_parameters() if "encoder" in n)
        found = (left + 0.1 * ALL) / (1.1 * ALL)
        assert found == pytest.approx(facts["measured"]) == pytest.approx(1 / 3, abs=0.01)
        assert facts["predicted"] == pytest.approx(found, abs=1e-6) and facts["corrected"] is None
