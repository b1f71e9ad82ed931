"""Quantized models side by side: sentence encoders with sentence-transformers' files, one model in two runtimes, a
pruned language model, int4 before and after adapters."""

from __future__ import annotations

import statistics
from typing import Any

from mptrain.report.words import megabytes
from scripts.results.drawn import interval, link, load, percent, table, where

THEIRS = "sentence-transformers/int8"


def sentence_vectors() -> list[str]:
    found = load("embedding.json")
    lines = [
        [
            row["name"],
            f"{100 * row['quality']:.1f}%",
            *(interval(row["over"][other], 2) if other in row["over"] else "" for other in ("fp32", THEIRS)),
            f"{row['fidelity']:.4f}",
            megabytes(row["size_bytes"]),
            f"{row['of_theirs']:.2f}",
        ]
        for row in found["rows"]
    ]
    overflow = (
        " This CPU adds products of int8 numbers in 16 bits, which 8-bit weights overflow; `7bit` and `embed-jpqd` are"
        " made for that with `reduce_range`."
        if found["sixteen_bit_sums"]
        else ""
    )
    return [
        "### Sentence vectors, against sentence-transformers' own int8",
        "",
        f"MiniLM on OpenVINO, NDCG@10 on {found['examples']:,} test reviews, paired intervals; as fp32 orders:"
        " Spearman's correlation of the cosines of 512 of them with those of the fp32 file; time over that of"
        f" sentence-transformers' file, a text of 32 tokens, one thread ({link('embedding.md')}, {where(found)})."
        f"{overflow}",
        "",
        *table(["", "NDCG@10", "to fp32", "to theirs", "as fp32 orders", "size", "of their time"], lines),
        "",
    ]


def _file(row: dict[str, Any]) -> list[str]:
    return [row["int8_layers"], megabytes(row["size_bytes"]), f"{row['ms']:.1f}", f"{row['of_own_fp32']:.2f}"]


def two_runtimes() -> list[str]:
    found = load("int8_runtimes.json")
    lines = [
        [
            row["name"],
            f"{100 * row['of_quantized']:.2f}%",
            f"{100 * row['of_stored']:.2f}%",
            f"{100 * row['accuracy']:.1f}%",
            *(_file(row) if "ms" in row else [""] * 4),
        ]
        for row in found["rows"]
    ]
    (facts,) = found["runs"].values()
    return [
        "### One int8 model on OpenVINO and onnxruntime",
        "",
        f"The model that `seed_jpqd` trained, its choices on {facts['examples']:,} test sentences against those of the"
        f" torch model with fake quantizers; one thread, {found['length']} tokens ({link('int8_runtimes.md')},"
        f" {where(found)}), as it was trained and with the embeddings that int8 files store. `torch-float64` and"
        " `torch-shifted` are this last model executed in torch once more, in float64 and with OpenVINO's arithmetic of"
        " quantizers: they differ in rounding alone, and say how near a runtime can come.",
        "",
        *table(
            ["", "as in torch", "int8 embeddings", "accuracy", "layers in int8", "size", "ms", "of its fp32"], lines
        ),
        "",
    ]


def _falling(losses: list[float]) -> float:
    """By how much the mean of the last quarter of the logged losses lies below that of the quarter before."""
    quarter = len(losses) // 4
    return statistics.mean(losses[-2 * quarter : -quarter]) - statistics.mean(losses[-quarter:])


def pruned_language_model() -> list[str]:
    found = load("llm_prune.json")
    lines = [
        [
            row["name"],
            f"{100 * row['kept']:.0f}%",
            megabytes(row["size_bytes"]),
            f"{row['ppl']:.2f}",
            percent(row["over"]),
            f"{row['tpot_ms']:.1f}",
            f"{row['trained_tokens']:,}" if "trained_tokens" in row else "",
        ]
        for row in found["rows"]
    ]
    missed = [bar["bar"] for bar in found["bars"] if not bar["met"]]
    told = f" Missed: {'; '.join(missed)}." if missed else ""
    rows = {row["name"]: row for row in found["rows"]}
    alike = [
        f"`{name}` {percent(row['against']['whole/trained'])}"
        for name, row in rows.items()
        if name.endswith("/trained") and "whole/trained" in row["against"]
    ]
    if alike:
        told += (
            " Against the whole model trained alike, `whole/trained`, the perplexities are above by"
            f" {', '.join(alike)}: that is what the smaller size costs, and that `pruned` lies below the whole model in"
            " int4 is owed to training on this kind of text."
        )
    falls = [f"`{name}` {_falling(row['losses']):.3f}" for name, row in rows.items() if "losses" in row]
    if falls:
        told += f" In the last quarter of the steps the training loss still fell by {', '.join(falls)} nats."
    return [
        "### A language model pruned, in int4 and trained",
        "",
        "SmolLM2-135M on OpenVINO with its cache, int4 in blocks of 64, the embedding in int8. `pruned`: by curvature,"
        " to so many percent of the blocks; `shallow`: as many as whole layers; `trained`: through the rounding, with"
        f" the float model as teacher, {found['steps']} steps of {found['batch'] * found['length']} tokens, which is"
        " little, of the kind of text that is tested. Perplexity and how far it is above or below that of the whole"
        f" model in int4, paired ({link('llm_prune.md')}, {where(found)}).{told}",
        "",
        *table(["", "of the blocks", "size", "perplexity", "over whole/gptq", "ms a token", "tokens trained"], lines),
        "",
    ]


_ADAPTED = {
    "fp32": "as it comes, fp32",
    "int4": "int4, the file",
    "int4+adapter": "int4 with the adapter beside it, by peft",
    "merged": "merged, fp32",
    "merged/nearest": "merged, rounded anew to nearest",
    "tuned": "merged, rounded anew by GPTQ, the file",
    "lora": "adapters over fp32, merged, fp32",
    "plain": "the same, rounded by GPTQ, the file",
}


def adapters() -> list[str]:
    found = load("adapters.json")
    lines = [
        [
            _ADAPTED[row["name"]],
            f"{row['ppl']:.2f}",
            *(percent(row["over"].get(other)) for other in ("int4", "plain")),
            *(f"{100 * row[key]:.0f}%" if key in row else "" for key in ("rounded", "kept")),
            f"{row['cpu_seconds'] / 60:.0f}" if "cpu_seconds" in row else "",
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "",
        ]
        for row in found["rows"]
    ]
    steps = found["windows"] // found["train"]["batch_size"]
    return [
        "### Adapters over int4 weights",
        "",
        f"SmolLM2-135M, int4 in blocks of 64, adapters of rank {found['adapters']['rank']} in {found['layers']} layers"
        f" ({100 * found['trained'] / found['parameters']:.1f}% as many parameters), {steps} steps of"
        f" {found['train']['batch_size']} x {found['length']} tokens of WikiText-2's validation text; perplexity on"
        f" {found['tokens']:,} tokens of its test text, paired intervals. Rounded: how far rounding anew moved the"
        " weights, of how far training did; kept: the share of training's change that is left. Time and memory are of"
        f" the whole run with its export ({link('adapters.md')}, {where(found)}).",
        "",
        *table(["", "perplexity", "to int4", "to the last row", "rounded", "kept", "CPU min", "peak GB"], lines),
        "",
    ]
