"""Write docs/results.md and the table in README.md from benchmarks/results: `python scripts/results.py`.

`--check` only compares. Every number that the project claims of speed, size or accuracy is drawn here and nowhere
else, so it stands once and is what was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jpqd import summary as jpqd
from mptrain.report.words import megabytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- made by scripts/results.py -->", "<!-- end -->"
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


# -- runs of recipes


def run_rows(report: Row) -> list[list[str]]:
    """A line to each variant of a run: accuracy, against dense, size, speed."""
    against = {comparison["id"]: comparison for comparison in report["comparisons"]}
    metric = report["metric"]["name"]
    found = []
    for variant in report["variants"]:
        compared = against.get(variant["id"])
        cells = [variant["id"], f"{100 * variant['metrics'][metric]['value']:.1f}%"]
        size, timed = megabytes(variant["size_bytes"]), (variant["latency_ms"] or {}).get(SETTING)
        speed = f"{timed['median']:.1f} ms" if timed else ""
        if compared is None:
            found.append([*cells, "", size, speed])
            continue
        low, high = (signed(100 * end) for end in compared["accuracy_delta_ci95"])
        cells.append(f"{signed(100 * compared['accuracy_delta'])} ({low} to {high})")
        cells.append(f"{size}, {times(compared['size_ratio'])} smaller")
        ratio = (compared["speedup"] or {}).get(SETTING)
        found.append([*cells, f"{speed}, {times(ratio)} as fast" if ratio else speed])
    return found


HEADS = ("variant", "accuracy", "against dense", "size", "batch 1, 128 tokens, 1 thread")


def runs() -> list[str]:
    text = [
        "## Recipes, as they are bundled",
        "",
        "Film reviews, MiniLM (6 layers); the test split has reviews of films that training did not see. Differences"
        " are in points and paired, with their 95% interval. The speed of int8 needs VNNI or AMX; that of the pruned"
        " fp32 models does not. Core ML and Core AI models were scored by the interpreter and by emulation, not on a"
        " device, and are not timed.",
        "",
    ]
    for path in sorted((RESULTS / "runs").glob("*.json")):
        report = load(f"runs/{path.name}")
        n = report["variants"][0]["metrics"][report["metric"]["name"]]["n"]
        minutes = report["wall_s"]["total"] / 60
        text += [
            f"### {report['name']}",
            "",
            f"{n:,} test reviews; {cores(report)} of {where(report)}; {minutes:.0f} minutes in"
            f" all ({link(f'runs/{path.name}', path.name)}).",
            "",
            *table(HEADS, run_rows(report)),
            "",
        ]
    return text


def readme_table() -> list[str]:
    report = load("runs/jpqd-bert.json")
    names = {
        "baseline_fp32": "dense fp32",
        "pruned_fp32": "pruned fp32",
        "jpqd_int8": "pruned int8",
        "jpqd_int8_emb4": "pruned int8, int4 embedding",
    }
    lines = [[names[line[0]], *line[1:]] for line in run_rows(report)]
    n = report["variants"][0]["metrics"]["accuracy"]["n"]
    return [
        *table(["", *HEADS[1:]], lines),
        "",
        f"`mptrain recipe jpqd-bert` on {cores(report)} of {where(report)}, in"
        f" {report['wall_s']['total'] / 60:.0f} minutes; {n:,} reviews",
        "of films that training did not see; paired differences in points with their 95% interval. All other results:",
        "[docs/results.md](docs/results.md), each with the command that made it.",
    ]


# -- benchmarks


def pruning() -> list[str]:
    lines = load("jpqd.jsonl")
    counted = sum(not line["point"].startswith("dense/") for line in lines)
    pairs = jpqd.against(lines, list(jpqd.PEERS))
    ours = [*pairs[:4], *(line for line in pairs[4:] if line.startswith("| fisher |"))]
    *orders, together = jpqd.orders(lines)
    found = together.split(" | ")
    quantizing = (
        f"Quantizing from the boundary on (`quantize: {{mode: qat, start: after_prune}}`, which costs less) against"
        f" jointly, all {len(orders) - 4} pairs together: {found[-2]} points, {found[-1].removesuffix(' |')}."
    )
    parts = [jpqd.means(lines), [quantizing], ours]
    return [
        "## JPQD: how far it goes, method by method and against peers",
        "",
        f"{counted} points on film reviews, each a whole run: {link('jpqd.md')}. A point counts as ahead or behind"
        " where its paired 95% interval leaves zero out. The peers, one seed each, prune the dense model at once; then"
        " it trains, is quantized and distilled like ours.",
        "",
        *(line for part in parts for line in [*part, ""]),
    ]


def seed_jpqd() -> list[str]:
    found = load("seed_jpqd.json")
    dense = found["rows"][0]["dense"]
    lines = [
        [
            r["name"],
            f"{100 * r['kept']:.0f}%",
            times(r["size_ratio"]),
            times(r["speedup"]),
            times(r["throughput_ratio"]),
            *(
                f"{signed(100 * r[split][0])} ({signed(100 * r[split][1])} to {signed(100 * r[split][2])})"
                for split in ("dev_delta", "test_delta")
            ),
        ]
        for r in found["rows"]
    ]
    heads = ["point / precision", "encoder kept", "smaller", "as fast", "throughput", "dev", "test"]
    reduced = " Weights of int8 have 7 bits, for this CPU." if found["rows"][0]["reduce_range"] else ""
    return [
        "## 110 million parameters on SST-2",
        "",
        "MPNet-base, a sentence encoder that never saw SST-2's labels, fine-tuned on its training sentences: dense"
        f" {100 * dense['dev']['value']:.1f}% of {dense['dev']['n']} on dev, {100 * dense['test']['value']:.1f}% of"
        f" {dense['test']['n']} on test. Against it, paired, in points, with 95% intervals: `once`, pruned by curvature"
        " and quantized without any training; `jpqd`, pruned by curvature, then int8 training and distillation. Batch"
        " 1, 128 tokens, one thread; throughput with requests in flight"
        f" ({link('seed_jpqd.md')}, {where(found)}).{reduced}",
        "",
        *table(heads, lines),
        "",
    ]


def latency_budget() -> list[str]:
    found = load("latency_budget.json")
    lines = [
        [r["precision"], f"{r['asked']:g}", f"{r['first']:.3f}", f"{r['ratio']:.3f}", signed(100 * r["off"]) + "%"]
        for r in found["rows"]
    ]
    return [
        "## A latency budget",
        "",
        "`prune.keep.latency` of a MiniLM BERT at length 128, one thread: the share of the whole model's latency that"
        " was asked for, what the first choice left, and what is left of the exported model in the end, timed anew"
        f" beside the uncut one ({link('latency_budget.md')}, {where(found)}, load average {found['load'][0]:.0f} on"
        f" {cores(found)}).",
        "",
        *table(["export", "asked for", "first choice", "measured", "off by"], lines),
        "",
    ]


def step() -> list[str]:
    found = rows("step.json")
    names = {
        "ours_native": "ours",
        "ours_split": "ours, `bf16-split`",
        "ours_torch": "ours, without a compiler",
        "deepspeed_cpu_adam": "DeepSpeed's CPUAdam",
        "fused_list_sync": "torch's fused AdamW and a copy",
        "foreach_list": "torch's foreach AdamW and a copy",
        "torchao_bf16_stochastic_round": "torchao, stochastic rounding",
    }
    lines = []
    for kind, name in names.items():
        same = [row for key, row in found.items() if key.endswith(f"/{kind}")]
        lines.append([name, span(row["ratio"] for row in same), span((row["ms"] for row in same), ".0f")])
    return [
        "### The whole optimizer step",
        "",
        "GPT-2: finite check, norm, clip, AdamW, half weights; one thread, median of 11 rounds, against one pass that"
        f" moves the same 30 bytes a parameter ({link('step.md')}, {where(load('step.json'))}).",
        "",
        *table(["", "× one pass", "ms"], lines),
        "",
    ]


def half_model() -> list[str]:
    seed = rows("seed_gpt2.json")

    def of(part: str) -> str:
        return span((row["ms"] for name, row in seed.items() if name.endswith(f"/{part}")), ".0f")

    allocated = max(r["MiB"] for name, r in seed.items() if name.endswith("/readapt"))
    lines = [
        ["`copy.deepcopy(model).half()` after each step", of("readapt"), f"{allocated:.0f} MiB"],
        ["our whole step", of("ours_step"), "none"],
        ["our sync alone", of("ours_sync"), "none"],
    ]
    sync = {name: row for name, row in rows("sync.json").items() if name.startswith(("gpt2", "bert"))}
    copies = {
        kind: span(
            r["ratio"] for name, r in sync.items() if name.endswith(f"/{kind}") and not name.startswith("tensors")
        )
        for kind in ("ours", "deepcopy_half", "load_state_dict", "loop_copy", "foreach_copy")
    }
    return [
        "### Half weights from masters",
        "",
        f"In the loop of a user who made GPT-2 half anew after each step ({link('seed_gpt2.md')},"
        f" {where(load('seed_gpt2.json'))}):",
        "",
        *table(["", "ms", "allocated"], lines),
        "",
        f"The sync of GPT-2 and BERT against one `copy_` of as many bytes ({link('sync.md')}):",
        "",
        *table(["", "× one copy"], [[name.replace("_", " "), value] for name, value in copies.items()]),
        "",
    ]


def equivalence() -> list[str]:
    found = load("equivalence.json")
    lines = []
    for row in found["rows"]:
        name, kind, what = row["name"].split("/")
        if what != "masters":
            continue
        pure = "not finite" if row["pure"] is None else f"{row['pure']:.0e}"
        lines.append([f"{name}, {kind.replace('_', '-')}", f"{row['ratio']:.0e}", f"{row['evaluation']:.0e}", pure])
    return [
        "### Training ends where fp32 ends",
        "",
        f"Largest relative difference of the loss to fp32 training over {found['steps']} steps"
        f" ({link('equivalence.md')}).",
        "",
        *table(["", "loss", "evaluation loss", "loss without masters"], lines),
        "",
    ]


def overhead() -> list[str]:
    (row,) = rows("trainer_overhead.json").values()
    overflow = load("overflow.json")
    seconds = span((r["seconds"] for r in overflow["rows"]), ".1f")
    casts = rows("overflow.json")["minilm/uform_mask"]["casts"]
    return [
        f"`mptrain.Trainer` with nothing enabled takes {row['ratio']:.2f} of the time of `transformers.Trainer`"
        f" ({row['min']:.2f} to {row['max']:.2f} over {row['rounds']} rounds on a busy machine;"
        f" {link('trainer_overhead.json')}).",
        "",
        f"The search for what must stay in fp32 takes {seconds} s on MiniLM and {overflow['samples']} texts; the mask"
        f" of UForm's text encoder is found, alone, at {casts} casts ({link('overflow.md')}).",
        "",
    ]


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


SECTIONS: list[Callable[[], list[str]]] = [
    runs,
    pruning,
    seed_jpqd,
    latency_budget,
    lambda: ["## Training in half precision", ""],
    step,
    half_model,
    equivalence,
    overhead,
    lambda: ["## Fewer bits to a weight", ""],
    kmeans,
    opt,
    exports,
    heads,
    onnx_casts,
    choices,
]


def page() -> str:
    text = [
        "# Results",
        "",
        "Made by `python scripts/results.py` from `benchmarks/results`; do not edit. Which command measures what:"
        " [benchmarks/README.md](../benchmarks/README.md). What the numbers do not say: [limits.md](limits.md).",
        "",
    ]
    return "\n".join([*text, *(line for section in SECTIONS for line in section())]).rstrip() + "\n"


def readme() -> str:
    """README.md with its table made anew."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return "\n".join([before + BEGIN, *readme_table(), END + rest.split(END)[1]])


def main() -> int:
    wanted = {PAGE: page(), README: readme()}
    if "--check" in sys.argv:
        stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
        print("".join(f"{name} is stale: run scripts/results.py\n" for name in stale), end="", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
