"""Which variant to use on this host: the fastest whose accuracy is inside the limit.

Measured, not assumed: where the CPU has no int8 dot products, int8 models are often slower
than fp32 ones of the same structure, and the fastest variant is then a larger file.
"""

from __future__ import annotations

from collections.abc import Sequence

from mptrain.core.host import fast
from mptrain.report.gates import within
from mptrain.report.row import Row
from mptrain.report.words import drop, ratio, setting_words

_NOISE = 0.98  # a ratio of medians above it is no slower


def recommend(
    length: str | None,
    unit: str,
    baseline: Row,
    variants: Sequence[Row],
    comparisons: Sequence[Row],
    host: Row,
    *,
    max_drop: float | None,
    setting: str | None,
) -> Row | None:
    """{id, setting, by_setting, smallest, reason, warnings}, or None when nothing was timed besides the baseline.

    Args:
        length: what the lengths of settings count, e.g. tokens. unit: of the main metric.
        max_drop: the accuracy limit; without one, a variant counts unless it is worse than the
            baseline by its paired interval.
        setting: the one that decides `id`; default: the smallest batch, longest input and
            fewest threads measured.
    """
    if not baseline["latency_ms"] or not any(v["latency_ms"] for v in variants if v["id"] != baseline["id"]):
        return None
    inside = {c["id"] for c in comparisons if within(c, max_drop) and (max_drop is not None or c["verdict"] != "worse")}
    candidates = [v for v in variants if v["id"] == baseline["id"] or v["id"] in inside]
    limit = "not worse than the baseline by the paired interval"
    if max_drop is not None:
        limit = f"inside the limit (at most {drop(unit, max_drop)} below the baseline)"
    by_setting = {}
    for key, time in baseline["latency_ms"].items():
        fastest = min((v for v in candidates if key in v["latency_ms"]), key=lambda v: v["latency_ms"][key]["median"])
        median = fastest["latency_ms"][key]["median"]
        by_setting[key] = {"id": fastest["id"], "median": median, "speedup": time["median"] / median}
    main = setting if setting is not None and setting in by_setting else main_setting(list(by_setting))
    chosen = by_setting[main]["id"]
    smallest = min(candidates, key=lambda v: v["size_bytes"])["id"]
    return {
        "id": chosen,
        "setting": main,
        "by_setting": by_setting,
        "smallest": smallest,
        "reason": _reason(length, limit, chosen, baseline["id"], main, by_setting),
        "warnings": _warnings(length, variants, host) + _told(baseline, variants),
    }


def main_setting(settings: Sequence[str]) -> str:
    """The setting speed is summed up by: smallest batch, longest input, fewest threads."""

    def rank(key: str) -> tuple[float, float, float]:
        part = {field[0]: field[1:] for field in key.split("_")}
        threads = float("inf") if part["t"] == "all" else int(part["t"])
        return int(part["b"]), -int(part.get("s", 0)), threads

    return min(settings, key=rank)


def _reason(length: str | None, limit: str, chosen: str, baseline: str, main: str, by_setting: dict[str, Row]) -> str:
    if chosen == baseline:
        return (
            f"No compressed variant {limit} was faster than {baseline} at {setting_words(main, length)} on this host."
        )
    wins = sum(row["id"] == chosen for row in by_setting.values())
    return (
        f"{chosen} was the fastest variant {limit} at {setting_words(main, length)} on this host,"
        f" {ratio(by_setting[main]['speedup'])} the speed of {baseline};"
        f" it was the fastest in {wins} of {len(by_setting)} measured settings."
    )


def _told(baseline: Row, variants: Sequence[Row]) -> list[str]:
    """That the baseline would be faster where nobody said what it computes in."""
    runtime = baseline["runtime"]
    own, other = runtime.get("inference_precision"), runtime.get("left_to_itself")
    same = [v for v in variants if all(v[key] == baseline[key] for key in ("stage", "format", "precision"))]
    if other is None or any(v["runtime"].get("inference_precision") == other for v in same):
        return []
    return [
        f"{baseline['id']} was timed in {own}, as its export says. Left to itself its runtime computes in {other} on"
        " this CPU, which rounds and is faster, and speed-ups over that are smaller. To see both, add an export of"
        f" {baseline['stage']} in {baseline['precision']} with hint: {other}."
    ]


def _warnings(length: str | None, variants: Sequence[Row], host: Row) -> list[str]:
    warnings = []
    quantized = [v for v in variants if v["precision"].startswith("int8")]
    if quantized and not fast(host["cpu_flags"])["int8"]:
        warnings.append(
            "This CPU has no int8 dot products (VNNI, AMX, DotProd): int8 makes models smaller here,"
            " not necessarily faster. On a CPU that has them the order can differ; measure there."
        )
    for small in quantized:
        # int8 against float of the same structure: the effect of quantization alone.
        same = [v for v in variants if v["precision"] == "fp32" and v["params"] == small["params"]]
        for plain in same:
            slower = {
                key: plain["latency_ms"][key]["median"] / small["latency_ms"][key]["median"]
                for key in small["latency_ms"].keys() & plain["latency_ms"].keys()
            }
            slower = {key: speed for key, speed in slower.items() if speed < _NOISE}
            if slower:
                worst = min(slower, key=lambda key: slower[key])
                computed = plain["runtime"].get("inference_precision", "f32").replace("f32", "fp32")
                warnings.append(
                    f"{small['id']} is slower than {plain['id']}, the same structure in {computed}, in {len(slower)} of"
                    f" {len(small['latency_ms'])} settings ({ratio(slower[worst])} its speed at"
                    f" {setting_words(worst, length)})."
                )
    return warnings
