"""Few trials, and a result that is right."""

from __future__ import annotations

import pytest

from mptrain.verify.fewest import fewest

LAYERS = 60
NAMES = [f"{layer}/{kind}" for layer in range(LAYERS) for kind in ("pow", "mean", "add", "rsqrt", "mul")][::-1]
ALIKE = {name: name.partition("/")[2] for name in NAMES}


class Trials:
    def __init__(self, *wanted):
        self.wanted, self.count = set(wanted), 0

    def __call__(self, kept):
        self.count += 1
        return self.wanted <= set(kept)


def least(trials, harm, one_by_one=lambda count: False):
    return fewest(NAMES, trials, harm=harm, alike=ALIKE, one_by_one=one_by_one)


def test_what_each_layer_needs_is_found_in_few_trials():
    wanted = [name for name in NAMES if ALIKE[name] in ("pow", "mean")]
    trials = Trials(*wanted)
    found = least(trials, {name: 1e-3 for name in NAMES if name not in wanted})
    assert found == wanted[::-1] and trials.count < 20, "in order of execution"


def test_great_harm_that_does_not_matter_is_dropped_kind_by_kind():
    """A mask of -inf is infinitely far from -3e38, and softmax makes 0 of both."""
    wanted = [name for name in NAMES if ALIKE[name] == "pow"]
    trials = Trials(*wanted)
    assert set(least(trials, {})) == set(wanted) and trials.count < 40


def test_of_a_kind_those_with_the_least_harm_are_dropped():
    wanted = [name for name in NAMES if ALIKE[name] == "pow" and int(name.partition("/")[0]) >= 17]
    trials = Trials(*wanted)
    harm = {name: float(name.partition("/")[0]) for name in NAMES if ALIKE[name] == "pow"}
    assert set(least(trials, harm)) == set(wanted) and trials.count < 40


@pytest.mark.parametrize("wanted", [["3/pow"], ["0/mean", "59/mul"], ["7/add", "8/add", "30/rsqrt"]])
def test_one_by_one_no_single_element_can_be_dropped(wanted):
    trials = Trials(*wanted)
    assert set(least(trials, {}, lambda count: True)) == set(wanted)
    assert trials.count < 80


def test_nothing_is_taken_for_right_without_a_trial():
    seen = []

    def right(kept):
        seen.append(sorted(kept))
        return len(kept) >= 100 and len(seen) < 9

    assert sorted(least(right, {})) in [NAMES[::-1], *seen]
