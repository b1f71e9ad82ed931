"""README.md of the run folder: a model card that the Hugging Face hub reads.

The front matter says only what the run knows: neither a licence nor a language is guessed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mptrain.report import claims
from mptrain.report.render.markdown import escape, grid
from mptrain.report.tables import choices, results

Row = dict[str, Any]

_PIPELINES = {"causal-lm": "text-generation"}
_CLASSES = {
    "text-classification": ("OVModelForSequenceClassification", "AutoTokenizer"),
    "token-classification": ("OVModelForTokenClassification", "AutoTokenizer"),
    "question-answering": ("OVModelForQuestionAnswering", "AutoTokenizer"),
    "image-classification": ("OVModelForImageClassification", "AutoImageProcessor"),
    "audio-classification": ("OVModelForAudioClassification", "AutoFeatureExtractor"),
    "causal-lm": ("OVModelForCausalLM", "AutoTokenizer"),
}
_PROCESSORS = {"AutoImageProcessor": "image_processor", "AutoFeatureExtractor": "feature_extractor"}


def card(report: Row) -> str:
    parts = [_front_matter(report), f"# {escape(report['name'])}", _summary(report)]
    verdict = [f"- {escape(claim.text)}" for claim in claims.claims(report)]
    if verdict:
        parts.append("\n".join(verdict))
    for table in (results.results(report), choices.table(report), results.latency(report)):
        if table:
            parts.append(f"## {table.title}\n\n{grid(table)}\n\n{escape(table.note)}")
    parts += [*_use(report), _limits(report)]
    parts.append("The whole report is in [report.html](report.html) and [report.json](report.json).")
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Row) -> str:
    recipe, metric = report["recipe"], report["metric"]
    facts: Row = {"library_name": "openvino", "pipeline_tag": _PIPELINES.get(report["task"], report["task"])}
    precisions = {v["precision"] for v in report["variants"]}
    methods = [m for m in ("prune", "quantize", "distill") if any(stage.get(m) for stage in recipe["stages"])]
    names = {"prune": "pruning", "quantize": "quantization", "distill": "distillation"}
    facts["tags"] = ["mptrain", "openvino", *(names[m] for m in methods), *sorted(precisions - {"fp32"})]
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
    source = _short(data["source"] or data["test"] or data["train"] or "custom")
    kind = _PIPELINES.get(report["task"], report["task"])
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": source, "type": source, "split": "test"},
            "metrics": [{"type": name, "value": value, "name": f"{name}, {v['id']}"}],
        }
        for v in report["variants"]
        if (value := v["metrics"][name]["value"]) is not None
    ]


def _summary(report: Row) -> str:
    recipe = report["recipe"]
    did = "; ".join(
        f"stage {stage['id']}: {', '.join(results.methods(stage)) or 'fine-tuning'}" for stage in recipe["stages"]
    )
    text = f"{recipe['description'].rstrip('. ')}. " if recipe["description"] else ""
    text += f"Made from {_short(recipe['model']['path'])} for {report['task'].replace('-', ' ')} ({did})."
    return escape(text)


def _cut(report: Row) -> list[str]:
    """How a pipeline reads longer texts as they were scored."""
    length = report["recipe"]["data"]["max_length"]
    if report["task"] != "text-classification":
        return []
    return [f'run("…", truncation=True, max_length={length})  # longer texts are cut, as they were when it was scored']


def _use(report: Row) -> list[str]:
    """How to load what the run made: the exported models, and the torch models."""
    parts = []
    exported = [v for v in report["variants"] if v["format"] == "openvino"]
    advice = report["recommendation"] or {}
    if exported:
        chosen = next((v for v in exported if v["id"] == advice.get("id")), exported[-1])
        model, processor = _CLASSES[report["task"]]
        pipeline = _PIPELINES.get(report["task"], report["task"])
        code = [
            f"from optimum.intel import {model}",
            f"from transformers import {processor}, pipeline",
            "",
            f"folder = {_folder(chosen)!r}",
            "# as it was measured; left to itself, OpenVINO computes in bf16 on CPUs with AMX",
            f'model = {model}.from_pretrained(folder, ov_config={{"INFERENCE_PRECISION_HINT": "f32"}})',
            f"processor = {processor}.from_pretrained(folder)",
            f"run = pipeline({pipeline!r}, model=model, {_PROCESSORS.get(processor, 'tokenizer')}=processor)",
            *_cut(report),
        ]
        folders = "\n".join(f"- {escape(v['id'])}: {escape(_folder(v))}" for v in exported)
        parts.append(f"## Use\n\n{_fence(code)}\n\nThe exported models:\n\n{folders}")
    if report["checkpoints"]:
        folder = list(report["checkpoints"].values())[-1]
        code = ["import mptrain", "", f"model = mptrain.load({folder!r})  # a torch model in eval mode"]
        text = (
            "The torch models, to train on or export again. A pruned or quantized one needs `mptrain.load`:"
            " plain `from_pretrained` does not know the changed shapes."
        )
        parts.append(f"### In torch\n\n{text}\n\n{_fence(code)}")
    return parts


def _folder(variant: Row) -> str:
    """What `from_pretrained` takes: the folder of the model file."""
    path = variant["path"]
    return path.rpartition("/")[0] if path.endswith(".xml") else path


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


def _fence(lines: list[str]) -> str:
    code = "\n".join(lines)
    marks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{marks}python\n{code}\n{marks}"


def _short(path: str) -> str:
    """A hub or packaged name as it is, of a path the last part: a card travels, folders do not."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return path if len(parts) <= 2 and not path.startswith((".", "/", "~", "\\")) else parts[-1]
