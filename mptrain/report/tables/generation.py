"""The table of what variants with a key-value cache write, and how fast."""

from __future__ import annotations

from mptrain.report import words
from mptrain.report.row import Row
from mptrain.report.tables.results import Cell, Table


def table(report: Row) -> Table | None:
    """One row per variant that generated text; None where none did."""
    found = [(v["id"], v["generation"]) for v in report["variants"] if v.get("generation")]
    if not found:
        return None
    columns = ["Variant", "First token", "Per token", "Tokens/s", "Memory", "As torch", "Perplexity with cache"]
    rows = []
    for variant, of in found:
        perplexity = of["perplexity"]
        peak = of["peak_bytes"]
        rows.append(
            [
                Cell(variant),
                _time(of["first_token_ms"]),
                _time(of["token_ms"]),
                Cell(f"{of['tokens_per_second']:.1f}"),
                Cell(words.NONE if peak is None else words.megabytes(peak)),
                Cell(f"{of['same_as_torch']} of {of['tokens']}"),
                Cell(f"{perplexity['token_by_token']:.3f}", f"{perplexity['whole']:.3f} without"),
            ]
        )
    of = found[0][1]
    note = (
        f"A prompt of {of['prompt']} tokens, then {of['tokens']}, each the most probable one, at batch 1 with"
        f" {of['threads']} thread{'s' * (of['threads'] != 1)}; medians of {of['first_token_ms']['runs']} texts in"
        " turns. Memory: what opening the file and writing the text added to the process. As torch: tokens up to the"
        f" first that the torch model chose otherwise. Perplexity of {of['perplexity']['tokens']:,} tokens that went in"
        " one by one, beside that of the same texts gone in whole."
    )
    return Table("Generation", columns, rows, note)


def _time(measured: Row) -> Cell:
    return Cell(f"{words.milliseconds(measured['median'])} ms", f"{words.milliseconds(measured['min'])} at least")
