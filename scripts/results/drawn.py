"""Result files, and how their numbers are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import exp
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SETTING = "b1_s128_t1"
MINUS = "−"

Row = dict[str, Any]


def load(name: str) -> Any:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def rows(name: str) -> dict[str, Row]:
    return {row["name"]: row for row in load(name)["rows"]}


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The first column is words, the others are numbers."""
    rule = "|".join(["---", *["--:"] * (len(heads) - 1)])
    return [f"| {' | '.join(heads)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def interval(ends: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """[value, low, high] of a difference of shares, times 100: in points, or in `unit`."""
    value, low, high = (signed(100 * end, digits) for end in ends)
    return f"{value}{unit} ({low} to {high})"


def percent(over: Sequence[float] | None) -> str:
    """A difference of log perplexities and its interval, in percent."""
    return "" if over is None else interval([exp(part) - 1 for part in over], unit="%")


def span(values: Iterable[float], form: str = ".2f") -> str:
    """ "1.09 to 1.15"; one number where they print alike."""
    found = list(values)
    low, high = f"{min(found):{form}}", f"{max(found):{form}}"
    return low if low == high else f"{low} to {high}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×" if value < 2 else f"{value:.1f}×"


def where(result: Row) -> str:
    return f"{result['host']['cpu']}, {'VNNI' if any('vnni' in f for f in result['host']['cpu_flags']) else 'no VNNI'}"


def cores(result: Row) -> str:
    count = result["host"]["cores_usable"]
    return f"{count} core{'s' * (count != 1)}"


def link(name: str, text: str | None = None) -> str:
    return f"[{text or name}](../benchmarks/results/{name})"
