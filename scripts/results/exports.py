"""Compressed weights, exports and the jobs that they are for."""

from __future__ import annotations

from mptrain.report.words import megabytes
from scripts.results.drawn import Row, link, load, percent, rows, signed, span, table, where


def kmeans() -> list[str]:
    found = rows("kmeans.json")
    size = load("kmeans.json")["size"]
    lines = []
    for kind in ("unweighted", "weighted"):
        same = [row for name, row in found.items() if name.endswith(f"/{kind}")]
        best = max(row["sse_over_exact"] for row in same)
        lines.append([kind, span((row["speedup"] for row in same), ".0f"), f"{best:.4f}"])
    return [
        "### Look-up tables",
        "",
        f"k-means of a {size}×{size} weight, 4 bits, groups of 4 to 32 channels and whole tensors: coremltools' time"
        f" over ours, and the largest ratio of our error to the exact minimum ({link('kmeans.md')},"
        f" {where(load('kmeans.json'))}).",
        "",
        *table(["", "times as fast", "error / exact"], lines),
        "",
    ]


def opt() -> list[str]:
    found = {(row["config"], row["method"]): row for row in load("opt_table.json")["rows"]}
    base = next(iter(found.values()))["ppl_uncompressed"]
    chosen = {
        ("4b/block32", "rtn"): "int4, blocks of 32, rounded to nearest",
        ("4b/block32", "gptq"): "int4, blocks of 32, GPTQ",
        ("3b/group16", "skm"): "3-bit tables, groups of 16, sensitive k-means",
        ("3b/group16", "skm_ft"): "the same, trained with their assignments",
        ("2b/group16", "skm"): "2-bit tables, groups of 16, sensitive k-means",
        ("2b/group16", "skm_ft"): "the same, trained with their assignments",
    }
    lines = [
        [
            name,
            signed(found[key]["ppl"] - base),
            signed(found[key]["ppl_coremltools"] - base),
            megabytes(found[key]["size_bytes"]),
        ]
        for key, name in chosen.items()
    ]
    faster = [r["seconds_coremltools"] / r["seconds"] for (_, method), r in found.items() if method == "skm"]
    return [
        "### A compressed OPT",
        "",
        f"Perplexity above the uncompressed {base:.1f}, ours and coremltools' (which trains no tables), at the size of"
        f" ours; all rows: {link('opt_table.md')}. Sensitive k-means, with the pass over calibration data that both"
        f" need, is {span(faster, '.0f')} times as fast as coremltools'.",
        "",
        *table(["", "ours", "coremltools", "size"], lines),
        "",
    ]


def language_model() -> list[str]:
    found = load("llm_openvino.json")
    rival = "optimum/64-scale"
    lines = []
    for row in found["rows"]:
        if "error" in row:
            lines.append([row["name"], "refused", "", "", "", "", ""])
            continue
        cells = [
            row["name"],
            megabytes(row["size_bytes"]),
            f"{row['ppl']:.2f}",
            percent(row.get("over", {}).get(rival)),
        ]
        lines.append([*cells, f"{row['tpot_ms']:.1f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}"])
    return [
        "### A language model in int4, against optimum-intel",
        "",
        "SmolLM2-135M on OpenVINO with its cache, blocks of 64; perplexity on the file, of"
        f" {found['tokens']:,} tokens of WikiText-2, and how far it is above or below that of optimum's best file,"
        f" paired ({link('llm_openvino.md')}, {where(found)}).",
        "",
        *table(["", "size", "perplexity", "over optimum's scale", "ms a token", "CPU s to make", "peak GB"], lines),
        "",
    ]


def exports() -> list[str]:
    coreml, coreai = load("coreml_matrix.json"), load("coreai_matrix.json")
    worst = max(row["parity_fp32"] for row in coreai["rows"])
    cosine = min(row["cosine_fp16"] for row in coreai["rows"])
    lines = [
        ["Core ML", f"{coreml['converted']} of {len(coreml['rows'])}", f"{coreml['worst_parity_fp32']:.0e}",
         f"{coreml['worst_cosine_fp16']:.5f}", link("coreml_matrix.json")],
        ["Core AI", f"{coreai['passed']} of {len(coreai['rows'])}", f"{worst:.0e}", f"{cosine:.5f}",
         link("coreai_matrix.md")],
    ]  # fmt: skip
    return [
        "## Exports of every family, executed",
        "",
        "BERT, RoBERTa, DistilBERT, ViT, OPT and Llama at random, by every attention, mask and shape: how many convert"
        " and compute what torch computes, the largest difference in fp32, the smallest cosine in fp16.",
        "",
        *table(["", "rows", "fp32", "fp16", ""], lines),
        "",
    ]


def reach() -> list[str]:
    locked, newest = load("reach.json"), load("reach_newest.json")
    columns = [name for name in locked["rows"][0] if name != "name"]
    lines = [
        [name.replace("_", " "), *(str(count) for found in (locked, newest) for count in _counts(found, name))]
        for name in columns
    ]
    before = {row["name"]: row for row in locked["rows"]}
    other = [
        f"{name} {key.replace('_', ' ')} ({_outcome(before[name][key])}, {_outcome(cell)})"
        for name, row in ((row["name"], row) for row in newest["rows"])
        for key, cell in row.items()
        if key != "name" and _outcome(cell) != _outcome(before[name].get(key, cell))
    ]
    return [
        "## Any architecture",
        "",
        f"{len(locked['rows'])} architectures, tiny and at random, with {_versions(locked)} (the versions of"
        f" constraints.txt), and with {_versions(newest)}, which pip gave without them: what is done with how many. A"
        f" refusal comes before training and names its reason ({link('reach.md')}, {link('reach_newest.md')}). What"
        f" comes out otherwise with the newer ones: {'; '.join(other) or 'nothing'}.",
        "",
        *table(["", "done", "refused", "failed", "done, newer", "refused", "failed"], lines),
        "",
    ]


def _versions(found: Row) -> str:
    return ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))


def _outcome(cell: str) -> str:
    return next((known for known in ("refused", "FAIL") if cell.startswith(known)), "done")


def _counts(found: Row, column: str) -> list[int]:
    """Done, refused, failed."""
    cells = [_outcome(row[column]) for row in found["rows"] if column in row]
    return [cells.count(outcome) for outcome in ("done", "refused", "FAIL")]


def heads() -> list[str]:
    found = rows("heads.json")
    lines = []
    for name, row in found.items():
        if name.endswith("/head"):
            batch = name.removesuffix("/head")
            others = [found.get(f"{batch}/{way}") for way in ("sort", "partition")]
            saved = [f"{100 * other['less']:.0f}%" if other else "–" for other in others]
            lines.append([batch.replace("/", ", "), f"{row['token_ms']:.0f}", *saved])
    return [
        "## The choice of a token in the graph",
        "",
        f"GPT-2 (124M) on OpenVINO with its cache, one thread: CPU milliseconds of a token with `heads: [{{topk: 20}},"
        f" {{softmax: true}}]`, and how much less that is than with all logits handed to numpy, sorted, or by"
        f" argpartition ({link('heads.md')}, {where(load('heads.json'))}; a busy machine). The body of the model is"
        " most of a token; of a prompt's first token it is the product with the vocabulary at all places that falls.",
        "",
        *table(["precision, batch", "ms", "less than sort", "less than partition"], lines),
        "",
    ]


def onnx_casts() -> list[str]:
    found = load("onnx_casts.json")
    lines = []
    for row in found["rows"]:
        if "error" in row:
            lines.append([row["name"], "none that runs", "", "", "", ""])
            continue
        cosine = f"{row['cosine']:.6f}" if row["cosine"] else "not finite"
        shares = f"{100 * row['casts_ratio']:.1f}%", cosine, f"{row['size_ratio']:.3f}", f"{row['latency_ratio']:.2f}×"
        lines.append([row["name"], str(row["casts"]), *shares])
    heads = ("model/way", "casts", "of the block list's", "cosine with torch", "of fp32's size", "of fp32's time")
    return [
        "### ONNX in fp16: casts",
        "",
        "Random weights with channels of FFNs beyond 65504; the same float32 files for all ways; cosine on inputs that"
        " were not calibrated on; time on a CPU, where onnxruntime has few kernels for half"
        f" ({link('onnx_casts.md')}, {where(found)}).",
        "",
        *table(heads, lines),
        "",
    ]


def recurrence() -> list[str]:
    found = load("recurrence.json")
    lines = [[r["name"], f"{r['loop']:.2f}", f"{r['of_unrolled']:.2f}", f"{r['of_padded']:.2f}"] for r in found["rows"]]
    missed = "; ".join(bar["bar"] for bar in found["bars"] if not bar["met"])
    said = f" Missed: {missed}." if missed else ""
    return [
        "## A recurrence that stays a loop",
        "",
        "A click model of two recurrences (DIEN), one thread: milliseconds, and the time as a part of that of the same"
        " model with its steps written out, and padded to the longest history"
        f" ({link('recurrence.md')}, {where(found)}; a busy machine).{said}",
        "",
        *table(["", "ms", "of written out", "of padded"], lines),
        "",
    ]


def scopes() -> list[str]:
    found = load("auto_scopes.json")
    lines = [
        [
            row["name"],
            *(_share(row[f"metric_{kind}"], ".2f", "not finite") for kind in ("fp32", "int8", "found")),
            _share(row["recovered"], ".0f", ""),
            "; ".join(_short(node) for node in row["nodes"]),
            str(row["evaluations"]),
            f"{row['seconds']:.0f}",
        ]
        for row in found["rows"]
    ]
    reduced = " Weights have 7 bits, for this CPU." if found["reduced_range"] else ""
    return [
        "## What int8 has to leave alone, found",
        "",
        f"`quantize: {{ignore: auto, max_drop: {found['limit']:g}}}` on a CNN whose descriptors are pooled and"
        f" normalized (`ptq-retrieval`), beside NNCF's accuracy control on the same data ({link('auto_scopes.md')},"
        f" {where(found)}).{reduced}",
        "",
        *table(
            ["", "fp32", "int8", "with what was found", "recovered", "nodes in float", "evaluations", "seconds"], lines
        ),
        "",
    ]


def _share(value: float | None, form: str, unknown: str) -> str:
    return unknown if value is None else f"{100 * value:{form}}%"


def _short(node: str) -> str:
    """`gem/aten::pow/Power_1` of `__module.module.gem/aten::pow/Power_1`."""
    return f"`{node.removeprefix('__module.').removeprefix('module.')}`"


def encrypted() -> list[str]:
    found = load("encrypted.json")
    lines = [
        [row["name"].replace("/", ", "), f"{row['ratio']:.2f}", f"{row['min']:.2f} to {row['max']:.2f}"]
        for row in found["rows"]
    ]
    return [
        "## Encrypted data",
        "",
        f"Time of a pass over the data, of that in clear; medians of pairs and their range ({link('encrypted.md')},"
        f" {where(found)}).",
        "",
        *table(["what is read, cipher", "of the time in clear", "range"], lines),
        "",
    ]


def choices() -> list[str]:
    found = load("multiple_choice.json")
    every = found["rows"].values()
    worst = max(row["difference"] for row in every)
    same = all(row[name][0] == row[name][1] for row in every for name in ("acc", "acc_norm"))
    assert same and all(row["context"] for row in every)
    return [
        "## Multiple choice, against lm-eval",
        "",
        f"Prompts, both accuracies and, to {worst:.0e} nats, log-likelihoods are those of lm-eval"
        f" {found['versions']['lm_eval']}, on {len(every)} pairs of a model and a task file: two random models on nine"
        f" files and a trained OPT on one ({link('multiple_choice.md')}).",
        "",
    ]
