"""Numbers of the report as people read them. None, a value that was not measured, is "n/a"."""

from __future__ import annotations

import re
from typing import Any

NONE = "n/a"
MINUS = "−"
_ABBREVIATIONS = {"auc": "AUC", "f1": "F1", "mae": "MAE", "map": "mAP", "mrr": "MRR", "mse": "MSE", "ndcg": "NDCG"}
_NAMES = {"rouge_l": "ROUGE-L", "chrf": "chrF"}
"""what is written in another case than words"""


def metric_name(name: str) -> str:
    """ "exact_match" as "exact match", "micro_f1" as "micro F1"."""
    if name in _NAMES:
        return _NAMES[name]
    return " ".join(re.sub(r"^[a-z0-9]+", lambda m: _ABBREVIATIONS.get(m[0], m[0]), part) for part in name.split("_"))


def heading(name: str) -> str:
    """Of a metric, with a capital where it is a word."""
    shown = metric_name(name)
    return shown[:1].upper() + shown[1:] if shown.islower() else shown


def metric(unit: str, value: float | None) -> str:
    """A score: "82.96%" for a fraction, "0.8296" for a coefficient, "12.34" for a number such as a loss."""
    if value is None:
        return NONE
    if unit == "fraction":
        return f"{100 * value:.2f}%"
    return f"{value:.4f}" if unit == "coefficient" else f"{value:.4g}"


def metric_range(unit: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return NONE
    if unit == "fraction":
        return f"{100 * low:.1f} to {100 * high:.1f}%"
    return f"{metric(unit, low)} to {metric(unit, high)}"


def signed(unit: str, delta: float | None) -> str:
    """A difference of scores: "−0.43" in points for fractions, in the metric's own unit else."""
    if delta is None:
        return NONE
    text = {"fraction": f"{100 * delta:+.2f}", "coefficient": f"{delta:+.4f}"}.get(unit, f"{delta:+.4g}")
    return text.replace("-", MINUS)


def signed_range(unit: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return NONE
    return f"{signed(unit, low)} to {signed(unit, high)}"


def points(unit: str) -> str:
    return " points" if unit == "fraction" else ""


def drop(unit: str, value: float | None) -> str:
    """A drop as gates know it: points for fractions, the difference for coefficients, relative for a number."""
    if value is None:
        return NONE
    if unit == "coefficient":
        return f"{value:.4f}".replace("-", MINUS)
    text = f"{100 * value:.2f}".replace("-", MINUS)
    return f"{text} points" if unit == "fraction" else f"{text}%"


def smaller(size_ratio: float | None) -> str:
    """ "5.24× smaller", and "1.14× larger" where the ratio is below one."""
    if size_ratio is None or size_ratio >= 1:
        return f"{ratio(size_ratio)} smaller"
    return f"{ratio(1 / size_ratio)} larger"


def megabytes(size: float | None) -> str:
    """Decimal megabytes, as file managers and download pages count."""
    if size is None:
        return NONE
    if size < 1e3:
        return f"{size:.0f} bytes"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def millions(count: float | None) -> str:
    if count is None:
        return NONE
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.2f} {letter}"
    return f"{count:.0f}"


def ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def milliseconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float | None) -> str:
    """Of examples a second."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def small(value: float | None) -> str:
    """A tolerance or numerical difference."""
    return NONE if value is None else f"{value:.2g}".replace("e-0", "e-")


def setting_words(key: str, length: str | None) -> str:
    """ "b1_s128_t1" as "batch 1, 128 tokens, 1 thread"; an unknown key as it is. length: what lengths count."""
    words = []
    for part in key.split("_"):
        kind, count = part[:1], part[1:]
        if kind == "b" and count.isdigit():
            words.append(f"batch {count}")
        elif kind == "s" and count.isdigit():
            words.append(f"{count} {length or 'long'}")
        elif kind == "t" and (count.isdigit() or count == "all"):
            words.append(f"{count} thread" + ("" if count == "1" else "s"))
        else:
            return key
    return ", ".join(words)


def kept_in_fp32(half: dict[str, Any]) -> str:
    """What an fp16 export keeps: "1 op in fp32: encoder/mul; 2 float↔half casts"."""
    ops, casts = half["kept_fp32"], half.get("float_casts", half.get("casts", 0))
    if not ops:
        return "no op has to stay in fp32"
    note = f" ({half['note']})" if half.get("note") else ""
    many = "s" * (len(ops) > 1)
    if half.get("scaled"):
        note = f"; {', '.join(half['scaled'])}: weights in fp16, channels scaled around them{note}"
    return f"{len(ops)} op{many} in fp32: {', '.join(fold(ops))}; {casts} float↔half cast{'s' * (casts != 1)}{note}"


def fold(names: list[str]) -> list[str]:
    """Names that differ in one number between dots, as one name with the range of numbers."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = f"{name[: match.start()]}\0{name[match.end() :]}" if match else name
        groups.setdefault(key, []).extend([int(match[0])] if match else [])
    return [key.replace("\0", _ranges(sorted(numbers))) for key, numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "{0-2,5}", a single number as it is."""
    spans: list[list[int]] = []
    for number in dict.fromkeys(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    return texts[0] if len(spans) == 1 and spans[0][0] == spans[0][1] else "{" + ",".join(texts) + "}"
