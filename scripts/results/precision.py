"""Training in half precision."""

from __future__ import annotations

from scripts.results.drawn import cores, link, load, rows, span, table, where


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


def eight_bits() -> list[str]:
    found, timed = load("moments.json"), load("step_int8.json")
    lines = []
    kinds = {
        "fp32_nudged": "fp32 from weights 1e-7 beside",
        "bf16_split": "`bf16-split`",
        "bf16_split_int8": "`bf16-split-int8`",
        "bf16_split_int8_other": "`bf16-split-int8`, rounded otherwise",
        "bitsandbytes_fp32_8bit": "bitsandbytes, AdamW8bit, fp32 weights, small tensors too",
        "torchao_fp32_8bit": "torchao, AdamW8bit, fp32 weights, small tensors too",
    }
    for row in found["rows"]:
        name, steps, kind = row["name"].split("/")
        last = f"{row['fp32_first']:.2f} to {row['fp32_last']:.2f}"
        off = [f"{of['mean']:+.1e} ± {of['reach']:.0e}, {of['most']:.0e}" for of in (row["end"], row["evaluation"])]
        lines.append([f"{name}, {kinds[kind]}", steps, str(row["seeds"]), last, *off])
    missed = [bar["bar"] for bar in found["bars"] if not bar["met"]]
    names = {
        "ours_split": "ours, `bf16-split`",
        "ours_int8": "ours, `bf16-split-int8`",
        "bitsandbytes_8bit": "bitsandbytes, AdamW8bit",
        "torchao_8bit": "torchao, AdamW8bit",
        "torchao_8bit_eager": "torchao, AdamW8bit, eager",
    }
    by_kind = {row["name"].split("/")[2]: row for row in timed["rows"]}
    steps = [
        [name, str(row["stream"]), f"{row['ratio']:.1f}", f"{row['ms']:,.0f}"]
        for kind, name in names.items()
        if (row := by_kind.get(kind))
    ]
    return [
        "### Moments in 8 bits",
        "",
        "`moments: int8` against AdamW in fp32, relative difference of the loss at the end: mean over seeds with its"
        f" 95% interval, and the largest of them ({link('moments.md')}; the bar is 1e-3, {said(missed)}). BERT's loss"
        " has just begun to fall at step 200, where a difference in the steps shows most.",
        "",
        *table(["", "steps", "seeds", "fp32 loss", "last 20 steps", "evaluation loss"], lines),
        "",
        "The whole step of GPT-2, one thread, against one pass that moves the bytes an update reads and writes"
        f" ({link('step_int8.md')}, {where(timed)}, load average {timed['load'][0]:.0f} on {cores(timed)}). The goal of"
        " 1.2 such passes is missed: decoding, the update and encoding are 93 instructions for eight parameters, where"
        " the pass has three. Both peers train bf16 weights alone. torchao compiles its step for every shape of a"
        f" parameter: its first step took {by_kind['torchao_8bit']['first_s']:.0f} s here, and `eager`, without"
        f" compiling, {by_kind['torchao_8bit_eager']['first_s']:.0f} s.",
        "",
        *table(["", "bytes a parameter", "× one pass", "ms"], steps),
        "",
    ]


def said(missed: list[str]) -> str:
    return "missed: " + "; ".join(missed) if missed else "met, with every seed"


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
