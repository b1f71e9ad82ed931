"""What the benchmark of the order in a stage computes of its rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.jpqd import order_facts, order_table


def test_the_divergence_of_margins_is_that_of_logits():
    teacher, student = (torch.randn(2, 50, 2, dtype=torch.float64) * 4).unbind()
    logs = [F.log_softmax(logits, -1) for logits in (student, teacher)]
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    margins = [(logits[:, 1] - logits[:, 0]).numpy() for logits in (teacher, student)]
    assert order_facts.divergences(*margins) == pytest.approx(expected.numpy(), abs=1e-12)
    assert np.isfinite(order_facts.divergences(np.array([900.0]), np.array([-900.0]))).all()


def test_units_in_common_count_both_ways():
    one = {"attention": f"{0b1100:x}/4", "ffn": f"{1 << 99:x}/100"}
    other = {"attention": f"{0b0111:x}/4", "ffn": f"{1 << 99:x}/100"}
    # one of two heads, and one of three
    assert order_facts.overlap(one, other) == {"heads": pytest.approx((1 / 2 + 1 / 3) / 2), "channels": 1.0}


def test_ranges_are_compared_in_percent_of_the_later():
    before = {"weights": {"a": np.array([1.0, 2.0])}, "activations": {}}
    after = {"weights": {"a": np.array([2.0, 2.0])}, "activations": {}}
    found = order_facts.ratios(before, after)
    assert found == {
        "weights": {"p10": pytest.approx(-45), "p50": pytest.approx(-25), "p90": pytest.approx(-5), "over_10": 0.5}
    }


def row(arm, seed, margins):
    numbers = dict.fromkeys(("seconds", "begin_kl", "float_kl", "clipped", "gradient_of_ranges"), 1.0)
    return {
        "name": f"{arm}/{seed}",
        "arm": arm,
        "seed": seed,
        "margins": order_table.packed(np.array(margins)),
        **numbers,
    }


def test_differences_are_paired_over_reviews_and_pooled_over_seeds():
    reference, other = order_table.REFERENCE, "another"
    result = {
        "dense": {"labels": "1100", "margins": order_table.packed(np.array([1.0, 1.0, -1.0, -1.0]))},
        "rows": [
            row(reference, 0, [1, 1, -1, 1]),
            row(reference, 1, [1, 1, 1, 1]),
            row(other, 0, [1, 1, -1, -1]),
            row(other, 1, [1, 1, -1, 1]),
        ],
    }
    first, second = order_table.pooled(result)
    assert (first["accuracy"], second["accuracy"]) == (0.625, 0.875)
    gaps = np.array([0, 0, 0.5, 0.5])  # of means over the two seeds
    reach = 1.96 * gaps.std(ddof=1) / 2
    assert second["accuracy_against"] == pytest.approx([0.25, 0.25 - reach, 0.25 + reach])
    assert second["accuracy_by_seed"] == [0.25, 0.25]
    assert order_table.between(result, other, reference, "accuracy") == pytest.approx(second["accuracy_against"])
    assert order_table.between(result, other, reference) == pytest.approx(second["kl_against"])
    assert np.isnan(order_table.between(result, other, "a third")).all()
