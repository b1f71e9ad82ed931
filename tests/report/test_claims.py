"""The words of a report: claims as honest as their intervals, numbers as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import report_sample as sample

from mptrain.report import claims, words


@pytest.fixture(scope="module")
def report():
    return sample.report()


def test_claims_say_tied_and_worse_as_the_interval_does(report):
    texts = [claim.text for claim in claims.claims(report)]
    assert "jpqd_int8_emb4 is 8.11× smaller" in texts[0] and texts[0].endswith("tied).")
    assert "pruned_fp32 is 2.21× faster" in texts[1]
    assert "560 optimizer steps" in texts[3] and texts[-1] == "All 6 gates of the recipe passed."
    variants = sample.variants()
    lost = [
        variants[0],
        *(replace(v, scores=[sample.score(0.5, 3, variants[0].scores[0], 0.15)]) for v in variants[1:]),
    ]
    wide = sample.report(variants=lost, recipe=sample.recipe(gates={"max_drop": 0.2}))
    assert "worse)" in claims.claims(wide)[0].text and claims.claims(wide)[0].tone == "warn"
    missed = claims.claims(sample.report(variants=lost))
    assert missed[0].text.startswith("No compressed variant stays within 1.00 points of baseline_fp32")
    assert missed[-1].tone == "bad" and "3 of 6 gates missed" in missed[-1].text


def test_more_training_of_the_compressed_model_is_said(report):
    short = [row for row in sample.history() if row["stage"] == "jpqd" or row["step"] <= 100]
    found = claims.claims(sample.report(history=short))
    assert any("more training than the baseline" in claim.text and claim.tone == "warn" for claim in found)


def test_slower_is_not_called_faster():
    variants = [replace(v, latency_ms=sample.times(1.0 if i == 0 else 0.8, 1)) for i, v in enumerate(sample.variants())]
    found = claims.claims(sample.report(variants=variants))[1]
    assert "0.80× the speed of baseline_fp32" in found.text and found.tone == "warn"


def test_layer_names_are_folded():
    names = [*sample.linears(3), "bert.pooler.dense", "classifier"]
    assert words.fold(names)[0] == "bert.encoder.layer.{0-2}.attention.self.query"
    assert words.fold(["a.0.b", "a.2.b", "a.3.b", "a.7.c"]) == ["a.{0,2-3}.b", "a.7.c"]
    assert words.fold(names)[-2:] == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.metric("fraction", 0.82961), "82.96%"),
        (words.metric("number", 12.3456), "12.35"),
        (words.metric("fraction", None), "n/a"),
        (words.signed("fraction", -0.00431), "−0.43"),
        (words.signed_range("number", -0.1, 0.2), "−0.1 to +0.2"),
        (words.drop("fraction", 0.01), "1.00 points"),
        (words.drop("number", 0.05), "5.00%"),
        (words.megabytes(90_860_000), "90.9 MB"),
        (words.megabytes(40_000), "40.0 kB"),
        (words.millions(22_713_986), "22.71 M"),
        (words.milliseconds(4.123), "4.12"),
        (words.milliseconds(132.4), "132"),
        (words.duration(834.1), "13 min 54 s"),
        (words.duration(7300), "2 h 01 min"),
        (words.small(2.4e-6), "2.4e-6"),
        (words.setting_words("b1_s128_t1", "tokens"), "batch 1, 128 tokens, 1 thread"),
        (words.setting_words("b8_tall", None), "batch 8, all threads"),
        (words.setting_words("b1_s16000_t2", "samples"), "batch 1, 16000 samples, 2 threads"),
        (words.setting_words("steady-state", "tokens"), "steady-state"),
    ],
)
def test_numbers_in_words(text, expected):
    assert text == expected


def test_the_training_of_the_baseline_is_that_of_its_own_stage():
    given = [replace(v, stage="model") if v.stage == "dense" else v for v in sample.variants()]
    (text,) = [
        c.text
        for c in claims.claims(sample.report(variants=given))
        if "optimizer steps" in c.text or "had more" in c.text
    ]
    assert text.startswith("The baseline (the model as it was given) was not trained here; stage")
    assert text.endswith("the compressed model had more training than the baseline.")
