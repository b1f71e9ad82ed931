"""The packaged film reviews: 12,752 sentences about 507 films, labelled fresh or rotten.

The file also holds plot summaries, which are dropped, and repeats: a text that occurs again
with the same label is kept once, one that occurs with both labels is dropped. Splits
are made by film (column "film"), so that no test review is of a film seen in training.
"""

from __future__ import annotations

from pathlib import Path

from mptrain.data.sources.tables import Table, read_table

GROUP = "film"


def read_film_reviews(path: Path) -> tuple[Table, dict]:
    """Return columns text, label and film, and the counts of what was dropped."""
    raw = read_table(str(path), "data.source")
    labels: dict[str, set[str]] = {}
    first: dict[str, tuple[int, str, str, str]] = {}
    rows = 0
    for number, label, text, film in zip(raw.rows, raw["category"], raw["text"], raw["movie_name"]):
        text = " ".join(text.split())
        if label == "plot" or not text:
            continue
        rows += 1
        labels.setdefault(text, set()).add(label)
        first.setdefault(text, (number, text, label, film))
    kept = [row for text, row in first.items() if len(labels[text]) == 1]
    dropped = {
        "rows_read": rows,
        "duplicates_dropped": rows - len(first),
        "conflicting_dropped": len(first) - len(kept),
    }
    columns = {name: list(values) for name, values in zip(("number", "text", "label", GROUP), zip(*kept))}
    numbers = columns.pop("number", [])
    return Table("packaged:film-reviews", columns, rows=numbers), dropped
