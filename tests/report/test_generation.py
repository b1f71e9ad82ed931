"""What variants with a cache wrote, in a report: the table, the gate, and reports from before it."""

from dataclasses import replace

from kit import report_sample as sample

from mptrain.report import notes
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page
from mptrain.report.tables import generation

TIME = {"median": 41.3, "min": 40.0, "runs": 3}
FOUND = {
    "prompt": 64,
    "tokens": 32,
    "threads": 1,
    "same_as_torch": 30,
    "perplexity": {"whole": 24.5, "token_by_token": 24.501, "relative": 4e-5, "tokens": 510},
    "peak_bytes": 250_000_000,
    "first_token_ms": TIME,
    "token_ms": TIME,
    "tokens_per_second": 24.2,
}


def report(**changes):
    """changes: of the second that wrote."""
    first, second, *others = sample.variants()
    variants = [replace(first, generation=FOUND), replace(second, generation=FOUND | changes), *others]
    return sample.report(variants=variants)


def gate(found):
    return next((g for g in found["gates"] if g["name"] == "cached_perplexity"), None)


def test_the_table_has_a_row_to_each_variant_that_wrote():
    found = report()
    table = generation.table(found)
    assert [row[0].text for row in table.rows] == ["baseline_fp32", "pruned_fp32"]
    assert [cell.text for cell in table.rows[0][3:]] == ["24.2", "250.0 MB", "30 of 32", "24.501"]
    assert "A prompt of 64 tokens" in table.note
    for text in (markdown(found), card(found), page(found)):
        assert "30 of 32" in text


def test_memory_that_is_not_known_is_said():
    assert generation.table(report(peak_bytes=None)).rows[1][4].text == "n/a"


def test_a_cache_that_changes_the_perplexity_misses_its_gate():
    passed = gate(report())
    assert (passed["value"], passed["limit"], passed["passed"]) == (4e-5, 1e-3, True)
    missed = gate(report(perplexity=FOUND["perplexity"] | {"relative": 0.02}))
    assert (missed["value"], missed["passed"], missed["variant"]) == (0.02, False, "pruned_fp32")
    assert not gate(report(perplexity=FOUND["perplexity"] | {"relative": float("nan")}))["passed"]


def test_without_generation_there_is_neither():
    found = sample.report()
    assert gate(found) is None and generation.table(found) is None
    for variant in found["variants"]:
        del variant["generation"]  # a report of before
    assert generation.table(found) is None and "Generation" not in markdown(found)


def test_what_the_weights_of_a_packaged_model_prove_is_said():
    def notes(path):
        return " ".join(sample.report(recipe=sample.recipe(model={"path": path, "task": "causal-lm"}))["notes"])

    assert "4-bit numbers in blocks of 32" in notes("packaged:smollm2-135m")
    assert "4-bit" not in notes("packaged:opt-untrained") and "4-bit" not in notes("smollm2-135m")


def test_a_loss_of_other_tokens_is_not_to_be_compared():
    facts = {"fewer": {"vocabulary": {"kept": 80, "of": 100, "used": 70, "changed": 0.25}}}

    def said(task):
        recipe = sample.recipe(model={"path": "some", "task": task})
        return next(note for note in notes.notes(recipe, [], None, {}, facts) if note.startswith("fewer"))

    assert "The loss is to a token of what is written" in said("seq2seq")
    assert said("text-classification").endswith("25.0% of the test inputs are spelled with others than before.")
