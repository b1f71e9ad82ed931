"""Multiple choice in a report: the table, what the verdict says, hostile names, and reports from before it."""

from dataclasses import replace

import numpy as np
import pytest
from kit import report_sample as sample

from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.report.claims import claims
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page
from mptrain.report.tables import choices

FACTS = {"file": "t.yaml", "split": "test", "questions": 400, "num_fewshot": 5, "guessing": 0.25, "truncated": 7}


def answers(right, lost=0):
    hits = np.zeros((400, 1))
    hits[: right - lost] = 1
    return [Score("acc", hits, MEAN)]


def report(name, *scores):
    recipe = sample.recipe(model={"path": "packaged:opt", "task": "causal-lm"})
    variants = [replace(v, multiple_choice={name: s}) for v, s in zip(sample.variants(), scores)]
    return sample.report(recipe=recipe, variants=variants, floor=None, multiple_choice={name: FACTS})


def verdict(found):
    return next((c.text, c.tone) for c in claims(found) if "arc acc:" in c.text)


def test_the_table_has_scores_differences_and_guessing():
    table = choices.table(report("arc", answers(200), answers(198), answers(150), answers(210)))
    assert table.columns == ["Variant", "arc acc", "Difference"]
    assert [row[1].text for row in table.rows] == ["50.00%", "49.50%", "37.50%", "52.50%", "25.00%"]
    assert [row[2].sub.partition(":")[0] for row in table.rows] == ["", "tied", "worse", "better", ""]
    assert "arc: 400 questions of test, 5-shot, 7 choices with contexts cut to the length of the model." in table.note


def test_the_verdict_names_what_is_worse():
    text, tone = verdict(report("arc", answers(200), answers(198), answers(150), answers(210)))
    assert text.startswith("arc acc: worse than the baseline (50.00%, 95% interval 45.1 to 54.9%): jpqd_int8 (−12.50")
    assert "pruned_fp32" not in text and tone == "warn"
    text, tone = verdict(report("arc", *[answers(200)] * 4))
    assert "no variant is worse than the baseline" in text and tone == "good"


def test_a_baseline_at_chance_shows_nothing():
    text, tone = verdict(report("arc", *[answers(101)] * 4))
    assert "not above guessing (25.00%)" in text and tone == "warn"


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b", "[x](http://y)"])
def test_task_names_are_text(name):
    found = report(name, *[answers(200)] * 4)
    assert "<script>alert" not in page(found)
    for text in (markdown(found), card(found)):
        assert name not in text


def test_reports_from_before_still_render():
    old = sample.report()
    del old["multiple_choice"]
    for row in [*old["variants"], *old["comparisons"]]:
        del row["multiple_choice"]
    assert choices.table(old) is None
    assert "Multiple choice" not in markdown(old) + page(old) + card(old)
