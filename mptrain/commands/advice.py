"""What the facts of `mptrain inspect` mean, in sentences."""

from __future__ import annotations

from typing import Any

from mptrain.report.words import fold

_MASK = 1e38  # finfo(float32).min and its like


def advice(facts: dict[str, Any]) -> list[dict[str, str]]:
    """[{"tone": good, warn or bad, "text"}]"""
    lines: list[tuple[str, str]] = []
    export = facts["export"]
    if export is not None:
        lines.append(_export_line(export))
        masked = [op for op in export["keep"] if _largest(export, op) > _MASK]
        if masked:
            fix = "a finite mask such as -1e4"
            if export["sdpa"] is not None and not export["sdpa"]["keep"]:
                fix = "model.attn: sdpa, with which nothing has to stay in fp32, or " + fix
            lines.append(("warn", f"{masked[0]} holds the least fp32 number, which fp16 makes -inf: use {fix}."))
    for compute, row in facts["training"].items():
        lines.append(_training_line(compute, row))
    forward = [row for row in facts["speed"]["rows"] if row["what"].startswith("forward")]
    for row in forward:
        verb = "pays" if row["pays"] else "does not pay"
        lines.append(
            (
                "good" if row["pays"] else "warn",
                f"{row['compute']} {verb} on this device: a forward is {row['ratio']:.2f} times as fast as in fp32.",
            )
        )
    return [{"tone": tone, "text": text} for tone, text in lines]


def _export_line(export: dict[str, Any]) -> tuple[str, str]:
    verified = _verified(export["after"])
    if not export["keep"]:
        return "good", f"fp16 export: every operation can be in fp16 ({verified})."
    count, casts = len(export["keep"]), export["casts"]
    return (
        "warn",
        f"fp16 export: {count} op{'s' * (count > 1)} in fp32: {', '.join(fold(export['keep']))}; {casts} float↔half"
        f" cast{'s' * (casts != 1)}; then {verified}.",
    )


def _verified(after: dict[str, Any]) -> str:
    if not after["finite"]:
        return "they are not finite"
    return f"cosine {after['cosine']:.6f}, largest difference {after['max_diff']:.2g}"


def _training_line(compute: str, row: dict[str, Any]) -> tuple[str, str]:
    if not row["runs_here"]:
        return "warn", f"{compute} could not be run on this device: {row['error']}"
    if row["keep_fp32"] is None:
        return (
            "bad",
            f"{compute}: no choice of modules to keep in fp32 helps. Use bf16-master, or make the model's own code safe"
            " (finfo(x.dtype).min instead of a fixed number).",
        )
    verified = _verified(row["after"])
    if not row["after"]["right"]:
        return "bad", f"{compute}: outputs differ too much from fp32 ({verified})."
    if not row["keep_fp32"]:
        return "good", f"{compute}: no module has to stay in fp32 ({verified})."
    count = len(row["keep_fp32"])
    return (
        "warn",
        f"{compute}: keep {count} module{'s' * (count > 1)} with {100 * row['kept']:.1f}% of the parameters in fp32;"
        f" then {verified}.",
    )


def _largest(export: dict[str, Any], op: str) -> float:
    return next(row["largest"] for row in export["ranges"] if row["op"] == op)
