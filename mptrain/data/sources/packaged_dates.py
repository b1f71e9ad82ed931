"""packaged:dates: 4,000 sentences with a date, and the date as ISO 8601 writes it, made up by a fixed seed.

    text    "Signed in Leeds on the 3rd of May, 1987."      target   1987-05-03

Nine ways to write a date and twelve sentences around it; years from 1900 to 2029. Day before month throughout, so each
text has one right answer, and a model that reads it can be right on all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

VERSION = 1
SOURCE = None
ROWS = 4000
_FIRST, _DAYS = date(1900, 1, 1), 47_482
_MONTHS = "January February March April May June July August September October November December".split()
_PLACES = "Leeds Lyon Oslo Porto Turin Ghent Cork Basel Malmo Brno".split()
_AROUND = [
    "{}",
    "Signed in {place} on {}.",
    "born {} in {place}",
    "The letter of {} was never answered.",
    "{place}, {}",
    "due by {} at the latest",
    "On {} the mill in {place} closed.",
    "she left {place} on {}",
    "Report of {}, second copy",
    "valid until {}",
    "It rained in {place} on {}.",
    "minutes of the meeting of {}",
]


def make(source: Path | None, folder: Path) -> None:
    """Write rows.jsonl into `folder`."""
    lines = [json.dumps({"text": text, "target": target}) for text, target in rows()]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows() -> Iterator[tuple[str, str]]:
    """(text, target) of each row."""
    draw = random.Random(0)
    for _ in range(ROWS):
        day = _FIRST + timedelta(days=draw.randrange(_DAYS))
        text = draw.choice(_AROUND).format(draw.choice(_written(day)), place=draw.choice(_PLACES))
        yield text, day.isoformat()


def _written(day: date) -> list[str]:
    """A date in the ways that there are."""
    number, month, year = day.day, _MONTHS[day.month - 1], day.year
    ending = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return [
        f"{number} {month} {year}",
        f"{number} {month[:3]} {year}",
        f"the {number}{ending} of {month}, {year}",
        f"{number}{ending} {month} {year}",
        f"{month} {number}, {year}",
        f"{month[:3]}. {number}{ending} {year}",
        f"{number}/{day.month}/{year}",
        f"{number:02}.{day.month:02}.{year}",
        f"{number:02}-{month[:3].lower()}-{year}",
    ]
