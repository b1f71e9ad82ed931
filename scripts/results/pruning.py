"""Pruning: JPQD, at once, at the seed's scale, to a latency."""

from __future__ import annotations

from benchmarks.jpqd import drop, order_table
from benchmarks.jpqd import summary as jpqd
from mptrain.recipe.family import RECOVERY
from scripts.results.drawn import RESULTS, cores, interval, link, load, signed, table, times, where


def joint() -> list[str]:
    lines = load("jpqd.jsonl")
    counted = sum(not line["point"].startswith("dense/") for line in lines)
    pairs = jpqd.against(lines, list(jpqd.PEERS))
    ours = [*pairs[:4], *(line for line in pairs[4:] if line.startswith("| fisher |"))]
    *orders, together = jpqd.orders(lines)
    found = together.split(" | ")
    fisher = jpqd.orders([line for line in lines if line["point"].startswith("fisher/")])
    quantizing = (
        f"Quantizing from the boundary on (`quantize: {{mode: qat, start: after_prune}}`, which costs less) against"
        f" jointly, all {len(orders) - 4} pairs together: {found[-2]} points, {found[-1].removesuffix(' |')}; of Fisher"
        f" alone, {len(fisher) - 5}: {fisher[-1].split(' | ')[-2]}. So it is the default: [jpqd.md](jpqd.md)."
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


def order() -> list[str]:
    found = load("joint_order.json")
    chosen, lines = found["setting"], []
    for e in sorted(order_table.pooled(found), key=lambda entry: entry["kl"]):
        cells = [e["arm"], str(e["seeds"]), f"{100 * e['accuracy']:.1f}%"]
        cells.append(interval(e["accuracy_against"], 2) if "accuracy_against" in e else "")
        cells.append(f"{1000 * e['kl']:.1f}")
        cells.append(interval([10 * end for end in e["kl_against"]]) if "kl_against" in e else "")
        lines.append([*cells, f"{e['seconds']:.0f}"])
    heads = ["arm", "seeds", "accuracy", "against joint", "from the teacher", "against joint", "CPU seconds"]
    return [
        "## The order in a stage",
        "",
        f"One dense MiniLM, cut to {100 * chosen['keep']:.0f}% of its encoder and trained to int8 in"
        f" {chosen['steps']} steps on the same batches, of which gradual pruning took {chosen['warmup']}; last third:"
        f" quantizers from step {chosen['late']} on. {len(found['dense']['labels']):,} test reviews, the torch model"
        f" with its fake quantizers; differences to `{order_table.REFERENCE}` on the same seeds, paired over reviews,"
        " 95%; from the teacher: KL divergence in 1/1000 nat, less is better. What the arms are and what follows:"
        f" [jpqd.md](jpqd.md); ranges and units: {link('joint_order.md')} ({where(found)}).",
        "",
        *table(heads, lines),
        "",
    ]


def one_shot() -> list[str]:
    found = load("one_shot.json")
    lines = []
    for row in found["rows"]:
        ahead = row.get("curvature_ahead")
        cells = [row["method"].replace("_", " "), f"{100 * row['keep']:.0f}%", f"{100 * row['accuracy']:.1f}%"]
        cells.append(interval(row["against_dense"]))
        lines.append([*cells, "" if ahead is None else interval(ahead), f"{row['seconds']:.0f}"])
    lines.sort(key=lambda cells: -int(cells[1].rstrip("%")))
    return [
        "## Pruned at once, without any training",
        "",
        f"A dense MiniLM of the film reviews ({100 * found['dense']['accuracy']:.1f}% of {found['dense']['n']:,} test"
        f" reviews), cut by each method from the same {found['calibration']:,} training reviews; points, paired"
        f" ({link('one_shot.md')}, {where(found)}).",
        "",
        *table(["method", "encoder kept", "accuracy", "against dense", "curvature ahead by", "seconds"], lines),
        "",
        f"Every bar of the method, met or missed: {link('jpqd_bars.json')}.",
        "",
    ]


def recovered() -> list[str]:
    found = load("recovery.json")
    lines = []
    for r in found["rows"]:
        kept = "mean of 25 and 15%" if r["keep"] is None else f"{100 * r['keep']:.0f}%"
        cells = [r["method"].replace("_", " "), kept, str(r["steps"]), f"{100 * r['test']:.1f}%"]
        ahead = r.get("curvature_ahead")
        lines.append([*cells, interval(r["against_dense"]), "" if ahead is None else interval(ahead)])
    first = found["rows"][0]
    return [
        "## Pruned at once, then trained",
        "",
        f"The same with {first['seeds']} seeds, and then as many steps of distillation of logits and hidden states for"
        " all, in float, each with the better of two learning rates on the validation split with the first seed."
        f" Accuracy on {first['n']:,} test reviews, mean of the seeds; points, paired ({link('recovery.md')},"
        f" {where(found)}).",
        "",
        *table(["method", "encoder kept", "steps", "accuracy", "against dense", "curvature ahead by"], lines),
        "",
    ]


def dropped() -> list[str]:
    found = load("drop.json")
    lines = []
    for r, before in zip(found["rows"], [None, *found["rows"]]):
        whole, same = r["whole"], before is not None and drop.same(r, before)
        cells = [f"{r['budget'].replace('_', ' ')} {r['asked']:g}", str(len(r["dropped"])) if whole else ""]
        cells += [f"{100 * r['encoder']:.1f}%", f"{r['share']:.2f}"]
        for split in ("validation", "test"):
            ahead = "the same model" if same else interval(r[split]["ahead"]) if whole else ""
            cells += [f"{100 * r[split]['accuracy']:.1f}%", ahead]
        lines.append(cells)
    dense = found["dense"]
    heads = ["budget", "blocks left out", "encoder kept", "of the time", "validation", "ahead by", "test", "ahead by"]
    return [
        "## Whole blocks left out",
        "",
        "The same dense model and the same curvature, pruned at once to the same budgets with heads and channels alone,"
        " and below it with `drop: true`, where whole attentions and FFNs may go too: how many went, and how far it is"
        f" ahead, paired, in points. Dense: {100 * dense['validation']['accuracy']:.1f}% of"
        f" {dense['validation']['n']:,} validation and {100 * dense['test']['accuracy']:.1f}% of"
        f" {dense['test']['n']:,} test reviews. Time: of the fp32 file in OpenVINO against the dense one's, batch 1,"
        f" 128 tokens, one thread ({link('drop.md')}, {where(found)}).",
        "",
        *table(heads, lines),
        "",
    ]


def vocabulary() -> list[str]:
    found = load("vocabulary.json")
    lines = []
    for r in found["rows"]:
        cells = [f"{r['tokens']:,}", "in use" if r["name"] == "used" else ""]
        lines.append([*cells, f"{100 * r['spelled_otherwise']:.1f}%", interval(r["against_dense"])])
    first = found["rows"][0]
    return [
        "## Fewer tokens",
        "",
        f"`vocabulary: {{keep: …}}` on {first['seeds']} dense MiniLMs of the film reviews ({found['whole']:,} tokens),"
        " without training after it: the commonest of the training split, those in use there, and beyond them the first"
        f" of the tokenizer. Share of {first['n']:,} test reviews that are spelled otherwise; their accuracy, mean of"
        f" the models, paired, in points ({link('vocabulary.md')}, {where(found)}).",
        "",
        *table(["tokens", "", "spelled otherwise", "against dense"], lines),
        "",
    ]


def embedding_rank() -> list[str]:
    found = load("embedding_rank.json")
    dense = found["dense"]
    lines = [
        [
            str(r["rank"]),
            "as often as it is read" if r["counted"] == "read" else "once",
            f"{100 * r['explained']:.0f}%",
            f"{r['parameters'] / 1e6:.1f} M",
            f"{100 * r['accuracy']:.1f}%",
            interval(r["against_dense"]),
            interval(r["ahead"]) if "ahead" in r else "",
        ]
        for r in found["rows"]
    ]
    heads = ["rank", "a row counts", "explained", "parameters", "test", "against dense", "ahead of once"]
    return [
        "## Embeddings of low rank",
        "",
        "`vocabulary: {rank: …}` on the dense MiniLM of the film reviews, without training after it, all tokens kept:"
        f" {100 * dense['accuracy']:.1f}% of {dense['n']:,} test reviews, with {dense['parameters'] / 1e6:.1f} M"
        f" parameters in the embedding. Paired, in points ({link('embedding_rank.md')}, {where(found)}).",
        "",
        *table(heads, lines),
        "",
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
            *(interval(r[split]) for split in ("dev_delta", "test_delta")),
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
        " and quantized without any training; `jpqd` and `fast`, pruned by curvature, then int8 training and"
        " distillation; `qat`, the same with nothing pruned. Batch 1, 128 tokens, one thread; throughput with requests"
        " in flight, which other work on the host slowed for the last two"
        f" ({link('seed_jpqd.md')}, {where(found)}).{reduced}",
        "",
        *table(heads, lines),
        "",
    ]


def family() -> list[str]:
    found = load("family.json")
    text = []
    for row in found["rows"]:
        mine, its = row["cpu_s"]
        text += [
            f"Points after the first trained {row['recovery']:g} of an epoch"
            f"{', the default' * (row['recovery'] == RECOVERY)}: {mine / 60:.0f} CPU minutes in a run to each of"
            f" {row['seeds']} dense models, {its / 60:.0f} in {len(row['points'])} to each,"
            f" {100 * row['ratio']:.0f}% of that.",
            "",
            *table(
                ["speed-up asked for", "in the family", "accuracy", "in a run of its own", "accuracy", "ahead by"],
                [
                    [
                        f"{p['speedup']}×",
                        times(p["measured"][0]),
                        f"{100 * p['family'][0]:.1f}%",
                        times(p["measured"][1]),
                        f"{100 * p['run'][0]:.1f}%",
                        interval(p["ahead"]),
                    ]
                    for p in row["points"]
                ],
            ),
            "",
        ]
    return [
        "## A family of speed-ups in one run",
        "",
        "`keep: {speedup: [2, 3, …]}` of a dense MiniLM: each point from the last, against a run to each from"
        " the dense model, all with curvature, one epoch of distillation of outputs in the runs and at the first point,"
        " the teacher asked once about each review in a family and in each step of the runs, the fp32"
        f" export, on one thread. Accuracy on {found['rows'][0]['points'][0]['n']:,} test reviews, the family ahead by,"
        f" paired, in points; speed-ups as the stages measured them ({link('family.md')}, {where(found)}).",
        "",
        *text,
    ]


def seeds() -> list[str]:
    text = ["## Presets with several seeds", ""]
    for path in sorted(RESULTS.glob("jpqd_seeds*.json")):
        name, found = path.stem, load(path.name)
        lines = [
            [r["name"], times(r["size_ratio"]), times(r["speedup"]), times(r["speedup_fp32"]), interval(r["delta"])]
            for r in found["rows"]
        ]
        changed = f" Made with {', '.join(f'`{change}`' for change in found['set'])}." if found["set"] else ""
        text += [
            f"`mptrain recipe {found['recipe']}` {len(lines) - 1} times, each with a dense model of its own seed: the"
            f" smallest int8 model, and the pruned one in fp32, against it. Accuracy on {found['rows'][-1]['n']:,} test"
            " reviews, paired, in points; the mean's interval is over reviews, not over seeds. Batch 1, 128 tokens, one"
            f" thread ({link(f'{name}.md')}, {where(found)}).{changed}",
            "",
            *table(["run", "size", "speed", "speed in fp32", "accuracy"], lines),
            "",
        ]
    return text


def distilled() -> list[str]:
    found = load("distil.json")
    lines = []
    for r in found["rows"]:
        ahead = ["", ""] if r["of"] == r["name"] else [interval(r["ahead"]), r["of"]]
        lines.append([r["name"], f"{100 * r['validation']:.1f}%", f"{100 * r['test']:.1f}%", *ahead])
    first = found["rows"][0]
    return [
        "## What a small model is taught by",
        "",
        f"A quarter of MiniLM's encoder, kept by curvature, then {first['steps']} steps on film reviews with the dense"
        f" model as the teacher, fp32; the mean of {first['seeds']} seeds. Terms of `distill` with their weights;"
        " `few`: labels of every fourth review, seen four times, or once with the inputs of all others"
        f" (`data.unlabelled`). Accuracy on {first['n']:,} test reviews, how far ahead of what, paired, in points"
        f" ({link('distil.md')}, {where(found)}).",
        "",
        *table(["taught by", "validation", "test", "ahead by", "of"], lines),
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
        "`prune.keep.latency` of a MiniLM BERT at length 128, one thread, `method: curvature` with `drop: true` (a head"
        " and a few channels of every block alone can take more than 0.15): the share of the whole model's latency that"
        " was asked for, what the first choice left, and what is left of the exported model in the end, timed anew"
        f" beside the uncut one ({link('latency_budget.md')}, {where(found)}, load average {found['load'][0]:.0f} on"
        f" {cores(found)}).",
        "",
        *table(["export", "asked for", "first choice", "measured", "off by"], lines),
        "",
    ]
