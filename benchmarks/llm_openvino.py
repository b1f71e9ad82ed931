r"""int4 of SmolLM2-135M on OpenVINO with its cache: ours against optimum-intel's, size, perplexity, time of a token.

    python -m benchmarks.llm_openvino --calibration wikitext2_valid.txt --test wikitext2_test.txt \
        --json benchmarks/results/llm_openvino.json     (--peer-python PATH: with requirements-llm.txt)

Both sides start from the same float32 folder, calibrate on the same 64 texts of 128 tokens, and are run in one way: by
our runner, with one thread, float32 activations and state (DYNAMIC_QUANTIZATION_GROUP_SIZE 0, KV_CACHE_PRECISION f32),
so a difference is one of the files. With --folder, files that are there are not made again. A row
<ours|optimum>/<config>:

    size_bytes    of the .xml and .bin together
    ppl           of the first 12,160 tokens of the test text, windows of 256 tokens, stride 128; ppl_1760: of the
                  first 1,760 of them, the number that other reports of this model have
    over          {row of the other side: [difference of the mean loss in nats a token, low, high]}, paired over runs of
                  128 tokens, 95%
    ttft_ms       from a prompt of 64 tokens to the first token; tpot_ms: of each of the 63 that follow. Medians of
                  rounds in which all files take turns
    cpu_seconds   of making the file, in a process of its own that loads, calibrates, compresses, converts and saves
                  (ours also checks the file token by token); peak_bytes: the most memory that it had

The weights of this model come from a file of 4 bits in asymmetric blocks of 32: rows of that form prove nothing, and
are left out of the verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kit.paired import markdown, mean_interval, write

MODEL = "packaged:smollm2-135m"
SAMPLES, LENGTH = 64, 128  # of calibration
WINDOW, STRIDE, TOKENS = 256, 128, 12160
SHORT = 1760
CACHE = 512
OURS: dict[str, dict[str, Any]] = {
    "gptq-64-asym": {"method": "gptq", "block_size": 64, "symmetric": False},
    "gptq-64": {"method": "gptq", "block_size": 64},
    "scale-64": {"method": "scale", "block_size": 64},
    "rtn-64": {"method": "rtn", "block_size": 64},
    "gptq-channel-asym": {"method": "gptq", "granularity": "channel", "symmetric": False},
    "gptq-channel": {"method": "gptq", "granularity": "channel"},
    "gptq-32": {"method": "gptq", "block_size": 32},
    "gptq-32-asym": {"method": "gptq", "block_size": 32, "symmetric": False},
}
OPTIMUM: dict[str, dict[str, Any]] = {
    "default": {},
    "64": {"group_size": 64},
    "64-sym": {"group_size": 64, "sym": True},
    "64-awq": {"group_size": 64, "quant_method": "awq", "calibrated": True},
    "64-scale": {"group_size": 64, "scale_estimation": True, "calibrated": True},
    "64-gptq": {"group_size": 64, "gptq": True, "calibrated": True},
    "channel": {"group_size": -1},
    "32": {"group_size": 32},
}
PROVES_NOTHING = ("32-asym", "optimum/32")


def texts(tokenizer: Any, file: Path) -> torch.Tensor:
    """Token ids [SAMPLES, LENGTH], spread over the text."""
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return whole[:: len(whole) // SAMPLES][:SAMPLES]


def make(settings: dict[str, Any], calibration: Path, out: Path) -> dict[str, Any]:
    """Ours, in a process of its own."""
    from mptrain.compress.weights.weight_only import compress
    from mptrain.export.openvino.write import export_openvino
    from mptrain.models.load import load_model
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Model, WeightOnly

    spec = Model(path=MODEL, task="causal-lm")
    model, tokenizer = load_model(spec, None, seed=0), load_processor(spec)
    ids = texts(tokenizer, calibration)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    config = WeightOnly(mode="weight_only", bits=4, embeddings="int8", lm_head="int8", **settings)
    compress(model, config, batches if settings["method"] != "rtn" else ())
    export_openvino(model, batches[0], out, precision="compressed", processor=tokenizer, cache=CACHE)
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * int(peak.split()[1])}


def made(side: str, config: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A row without its scores, of a process that made the file; `error` where it refused."""
    out = folder / side / config
    shutil.rmtree(out, ignore_errors=True)
    if side == "ours":
        command = [sys.executable, "-m", "benchmarks.llm_openvino", "--make", config, "--into", str(out)]
        command += ["--calibration", str(options.calibration)]
    else:
        command = [options.peer_python, "-m", "benchmarks.llm.peer_optimum", str(packaged_folder()), str(out)]
        command += [json.dumps(OPTIMUM[config]), str(folder / "texts.json")]
    one = dict.fromkeys(("OMP_NUM_THREADS", "TBB_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"name": f"{side}/{config}", "error": said[-1][:400] if said else f"exit status {done.returncode}"}
    size = sum(path.stat().st_size for path in out.glob("openvino_model.*"))
    return {"name": f"{side}/{config}", "size_bytes": size, **json.loads(done.stdout.splitlines()[-1])}


def packaged_folder() -> Path:
    from mptrain.data.sources import packaged

    return packaged.fetch(MODEL)


def opened(xml: Path, threads: int = 1) -> Any:
    from mptrain.export.openvino.runner import CachedIr

    return CachedIr(xml, None, threads)


def losses(runner: Any, stream: list[int]) -> np.ndarray:
    """-log p [TOKENS - 1], float64, as a recipe scores it (mptrain.data.tasks.causal_lm): every token but the first is
    predicted once."""
    ids = np.asarray(stream[:TOKENS], dtype=np.int64)
    found, predicted = [], 1
    for start in range(0, len(ids), STRIDE):
        part = ids[start : start + WINDOW]
        if start + len(part) <= predicted:
            break
        logits = torch.from_numpy(runner({"input_ids": part[None]})["logits"])[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part[1:]), reduction="none")
        found.append(loss[max(0, predicted - start - 1) :].double().numpy())
        predicted = start + len(part)
    return np.concatenate(found)


def paired(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Mean of one - other, and its interval (95%, normal), from the means of runs of STRIDE tokens."""
    runs = (one - other)[: len(one) // STRIDE * STRIDE].reshape(-1, STRIDE).mean(axis=1)
    return mean_interval(runs)


def time_all(files: dict[str, Path], prompt: np.ndarray) -> dict[str, dict[str, float]]:
    """{"ttft_ms", "tpot_ms"} by row; the files take turns."""
    from mptrain.measure import generation
    from mptrain.recipe import Generation

    runners = {name: opened(path) for name, path in files.items()}
    how = Generation(prompt=prompt.shape[1], tokens=64, threads=1)
    found = generation.timed(list(files), lambda name, _: runners[name], prompt, how)
    return {
        name: {"ttft_ms": row["first_token_ms"]["median"], "tpot_ms": row["token_ms"]["median"]}
        for name, row in found.items()
    }


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Against each of optimum's rows: one of ours that is no larger, of a lower perplexity (the paired interval
    excludes zero), and not slower a token."""
    judged = [row for row in rows if "ppl" in row and not row["name"].endswith(PROVES_NOTHING)]
    ours = [row for row in judged if row["name"].startswith("ours/")]
    found = []
    for theirs in (row for row in judged if row["name"].startswith("optimum/")):
        name = theirs["name"]
        fits = [row for row in ours if row["size_bytes"] <= theirs["size_bytes"] and row["over"][name][2] < 0]
        quick = [row["name"] for row in fits if row["tpot_ms"] <= 1.03 * theirs["tpot_ms"]]
        found.append((f"no larger, lower perplexity, no slower a token (3%) than {name}", bool(quick)))
    gptq = [row["cpu_seconds"] for row in rows if row["name"] == "optimum/64-gptq" and "cpu_seconds" in row]
    own = [row for row in rows if row["name"].startswith("ours/gptq")]
    if gptq and own:
        found.append(("GPTQ takes no more CPU time than optimum's", max(r["cpu_seconds"] for r in own) <= gptq[0]))
    found.append(("no export of ours takes 3 GB", all(r["peak_bytes"] < 3e9 for r in rows if r in own)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--folder", type=Path, help="where the files go, and stay; default: a temporary one")
    parser.add_argument("--only", nargs="*", help="rows to make, e.g. ours/gptq-64")
    parser.add_argument("--make", choices=list(OURS), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        torch.set_num_threads(1)
        print(json.dumps(make(OURS[options.make], options.calibration, options.into)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        compared(options, options.folder or Path(temporary))


def compared(options: argparse.Namespace, folder: Path) -> None:
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Model

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_processor(Model(path=MODEL, task="causal-lm"))
    calibration = [tokenizer.decode(row) for row in texts(tokenizer, options.calibration)]
    (folder / "texts.json").write_text(json.dumps(calibration))
    stream = tokenizer(options.test.read_text(encoding="utf-8"))["input_ids"]
    names = [f"{side}/{config}" for side, known in (("ours", OURS), ("optimum", OPTIMUM)) for config in known]
    kept = folder / "rows.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in names:
        side, config = name.split("/", 1)
        if options.only and name not in options.only:
            continue
        if name not in known:
            known[name] = made(side, config, options, folder)
        if "error" not in known[name] and "ppl" not in known[name]:
            with closing(opened(folder / name / "openvino_model.xml")) as runner:
                found = losses(runner, stream)
            np.save(folder / name / "losses.npy", found)
            known[name]["ppl"] = float(np.exp(found.mean()))
            known[name]["ppl_1760"] = float(np.exp(found[: SHORT - 1].mean()))
        kept.write_text(json.dumps(known))
        print(json.dumps(known[name]), flush=True)
    rows = [known[name] for name in names if name in known]
    files = {row["name"]: folder / row["name"] / "openvino_model.xml" for row in rows if "error" not in row}
    for name, times in time_all(files, np.array([stream[:64]], dtype=np.int64)).items():
        known[name] |= times
    scored = {row["name"]: np.load(folder / row["name"] / "losses.npy") for row in rows if "ppl" in row}
    for name, found in scored.items():
        others = {other: loss for other, loss in scored.items() if other.split("/")[0] != name.split("/")[0]}
        known[name]["over"] = {other: paired(found, loss) for other, loss in others.items()}
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.json:
        columns = {
            "name": "row", "size_mb": "MB", "ppl": "perplexity", "ppl_1760": "of 1,760 tokens",
            "ttft_ms": "first token, ms", "tpot_ms": "per token, ms",
            "cpu_seconds": "CPU s", "peak_gb": "peak GB", "error": "refused",
        }  # fmt: skip
        shown = [
            row if "error" in row else {**row, "size_mb": row["size_bytes"] / 1e6, "peak_gb": row["peak_bytes"] / 1e9}
            for row in rows
        ]
        table = markdown(shown, columns)
        write(options.json, rows, bars(rows), table, plotted=None, samples=SAMPLES, length=LENGTH, tokens=TOKENS)


if __name__ == "__main__":
    main()
