"""README.md of the run folder: a model card that the Hugging Face hub reads.

The front matter says only what the run knows: neither a licence nor a language is guessed.
"""

from __future__ import annotations

import re

import yaml

from mptrain.recipe.exports import spec_of
from mptrain.recipe.exports.base import Use
from mptrain.report import claims
from mptrain.report.render.markdown import escape, grid
from mptrain.report.row import Row
from mptrain.report.tables import choices, generation, results

_PROCESSORS: dict[str | None, tuple[str | None, str]] = {
    "tokenizer": ("AutoTokenizer", '"…"'),
    "image": ("AutoImageProcessor", "image"),
    "audio": ("AutoFeatureExtractor", "sound"),
}
"""by kind: the class that loads it, and what it is called on"""


def card(report: Row) -> str:
    parts = [_front_matter(report), f"# {escape(report['name'])}", _summary(report)]
    verdict = [f"- {escape(claim.text)}" for claim in claims.claims(report)]
    if verdict:
        parts.append("\n".join(verdict))
    for table in (
        results.results(report),
        choices.table(report),
        results.latency(report),
        results.throughput(report),
        generation.table(report),
    ):
        if table:
            parts.append(f"## {table.title}\n\n{grid(table)}\n\n{escape(table.note)}")
    parts += [*_use(report), _limits(report)]
    parts.append("The whole report is in [report.html](report.html) and [report.json](report.json).")
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Row) -> str:
    recipe, metric = report["recipe"], report["metric"]
    libraries = list(dict.fromkeys(spec_of(v["format"]).library for v in report["variants"]))
    facts: Row = {"library_name": libraries[0]} if libraries and libraries[0] else {}
    facts["pipeline_tag"] = report["about_task"]["tag"]
    precisions = {v["precision"] for v in report["variants"]}
    facts["tags"] = ["mptrain", *filter(None, libraries), *results.tags(report), *sorted(precisions - {"fp32"})]
    if report["on_hub"]["model"]:
        facts["base_model"] = recipe["model"]["path"]
    if report["on_hub"]["data"]:
        facts["datasets"] = [recipe["data"]["source"]]
    if metric:
        facts["metrics"] = [metric["name"]]
        facts["model-index"] = [{"name": report["name"], "results": _results(report)}]
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _results(report: Row) -> list[Row]:
    """Every variant's main metric, in the form of the hub's model index."""
    data, name = report["recipe"]["data"], report["metric"]["name"]
    source = short(data["source"] or data["test"] or data["train"] or "custom")
    kind = report["about_task"]["tag"]
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": source, "type": source, "split": "test"},
            "metrics": [{"type": name, "value": value, "name": f"{name}, {v['id']}"}],
        }
        for v in report["variants"]
        if (value := v["metrics"].get(name, {}).get("value")) is not None
    ]


def _summary(report: Row) -> str:
    recipe = report["recipe"]
    did = "; ".join(
        f"stage {stage['id']}: {', '.join(results.methods(report, stage['id'])) or 'fine-tuning'}"
        for stage in recipe["stages"]
    )
    text = f"{recipe['description'].rstrip('. ')}. " if recipe["description"] else ""
    start = recipe["model"].get("module") or recipe["model"]["path"]
    text += f"Made from {short(start)} for {report['task'].replace('-', ' ')} ({did})."
    return escape(text)


def _use(report: Row) -> list[str]:
    """How to load what the run made: the exported models, by format, and the torch models."""
    parts = []
    formats = list(dict.fromkeys(v["format"] for v in report["variants"]))
    for number, name in enumerate(formats):
        exported = [v for v in report["variants"] if v["format"] == name]
        if code := _loading(report, exported):
            folders = "\n".join(f"- {escape(v['id'])}: {escape(_folder(v))}" for v in exported)
            title = "## Use" if not number else f"### With {escape(spec_of(name).title)}"
            parts.append(f"{title}\n\n{fence(code)}\n\nThe exported models:\n\n{folders}")
    if report["checkpoints"]:
        folder = list(report["checkpoints"].values())[-1]
        code = ["import mptrain", "", f"model = mptrain.load({folder!r})  # a torch model in eval mode"]
        text = (
            "The torch models, to train on or export again. A pruned or quantized one needs `mptrain.load`:"
            " plain `from_pretrained` does not know the changed shapes."
        )
        parts.append(f"### In torch\n\n{text}\n\n{fence(code)}")
    return parts


def _loading(report: Row, exported: list[Row]) -> list[str]:
    """The code that loads the recommended variant of a format, else its last; none for a format unknown here."""
    advice = report["recommendation"] or {}
    chosen = next((v for v in exported if v["id"] == advice.get("id")), exported[-1])
    about = report["about_task"]
    cut = report["recipe"]["data"]["max_length"] if about.get("cuts") else None
    return loading(chosen["format"], about, chosen["path"], _folder(chosen), cut, chosen["runtime"])


def loading(format: str, about: Row, path: str, folder: str, cut: int | None, runtime: Row) -> list[str]:
    """Lines of Python that load an exported model. about: what a report says of its task. runtime: its facts."""
    processor, inputs = _PROCESSORS.get(about.get("processor"), (None, "inputs"))
    inputs = about.get("call") or inputs
    return spec_of(format).loading(
        Use(
            path,
            folder,
            about.get("pipeline"),
            processor,
            about.get("optimum"),
            inputs,
            cut,
            cached="cache" in runtime,
            inference=runtime.get("inference_precision", "f32"),
            heads="heads" in runtime,
        )
    )


def _folder(variant: Row) -> str:
    """The folder of the model file or package, with its config and processor."""
    return variant["path"].rpartition("/")[0]


def _limits(report: Row) -> str:
    lines = [
        "Scores hold for the test split named above. Other data, domains and languages were not measured.",
        f"Latency was measured on {report['host'].get('cpu', 'one host')}; on other processors the variants can rank"
        " differently.",
        "Compression can change behaviour on rare inputs and groups more than the average shows;"
        " what the pretrained model gets wrong or has learned from its data, the compressed one inherits.",
    ]
    worse = [c["id"] for c in report["comparisons"] if c["verdict"] == "worse"]
    if worse:
        lines.append(f"Worse than the baseline by the paired interval: {', '.join(worse)}.")
    missed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    if missed:
        lines.append(f"Gates of the recipe that this run missed: {', '.join(missed)}.")
    return "## Limits\n\n" + "\n".join(f"- {escape(line)}" for line in lines)


def fence(lines: list[str]) -> str:
    code = "\n".join(lines)
    marks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{marks}python\n{code}\n{marks}"


def short(path: str) -> str:
    """A hub or packaged name as it is, of a path the last part: a card travels, folders do not."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return path if len(parts) <= 2 and not path.startswith((".", "/", "~", "\\")) else parts[-1]
