"""mptrain's multiple-choice scores against lm-eval's, on the same task files, models and rows.

    pip install --target DIR lm-eval evaluate …     # in a scratch folder; nothing of mptrain needs it
    PYTHONPATH=DIR HF_HUB_OFFLINE=1 python -m benchmarks.scores.multiple_choice [--model FOLDER --text FILE]

Two random models (an OPT whose tokenizer puts a bos token in front, a Llama whose does not), nine task files that use
what a file can say, 150 questions each; with --model a trained one too, asked which of four passages goes on after 40
words of running text, 200 times. A row of results/multiple_choice.md:

    context        all prompts are the same text
    |ll - ll|      largest difference of a choice's log-likelihood, in nats; mean |ll| beside it
    acc, acc_norm  mptrain's and lm-eval's
    cut            choices whose context is longer than the model reads
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
import transformers as t
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mptrain.data.lm_eval.questions import MultipleChoice, context_length

RESULTS = Path(__file__).parents[1] / "results"
WORDS = "alpha beta gamma river stone cloud tree house green red runs sleeps quick slow because and the of a in".split()
ROWS = {"train": 40, "test": 150, "dev": 10}
LETTER = {"doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}"}
TASKS: dict[str, dict[str, Any]] = {
    "template": {"doc_to_text": "Question: {{question}}\nAnswer:", **LETTER},
    "columns": {"doc_to_text": "question", "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": "label",
                "target_delimiter": "\n", "test_split": None, "validation_split": "test"},
    "letters_3shot": {"doc_to_text": "{{question.strip()}}\nA. {{choices.text[0]}}\nB. {{choices.text[1]}}\nAnswer:",
                      "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answerKey", "num_fewshot": 3,
                      "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
                      "description": "About {{choices.text[0]}}.\n\n"},
    "drawn_2shot": {"doc_to_text": "{{question}} ", **LETTER, "training_split": "train", "num_fewshot": 2},
    "own_split_4shot": {"doc_to_text": "Q: {{question}}", **LETTER, "fewshot_split": "test", "num_fewshot": 4},
    "no_context": {"doc_to_text": "", "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": 0, "target_delimiter": ""},
    "mapping": {"doc_to_text": "{{question|regex_replace('the', 'THE')}}", "doc_to_target": 2,
                "doc_to_choice": {"a": "yes", "b": "no way", "c": "maybe"}},
    "several_right": {"doc_to_text": "question", **LETTER, "doc_to_target": "{{[0, label + 1]}}"},
    "too_long": {"doc_to_text": "{% for i in range(14) %}{{question}} {% endfor %}", **LETTER},
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 400, "hidden_size": 48}


def sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def write(folder: Path) -> None:
    """Rows and task files."""
    draw = random.Random(0)
    for split, count in ROWS.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                row = {
                    "question": sentence(draw, 3, 20),
                    "choices": {"text": [sentence(draw, 1, 6) for _ in range(4)], "label": list("ABCD")},
                    "answerKey": draw.choice("ABCD"),
                    "label": draw.randrange(2),
                    "sol1": sentence(draw, 1, 4),
                    "sol2": sentence(draw, 1, 4),
                }
                file.write(json.dumps(row) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ROWS}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    for name, keys in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, "task": f"mp_{name}", **keys}, sort_keys=False))


def write_continuations(folder: Path, text: Path) -> None:
    """The task file `continuation`: 40 words of a paragraph, then its own 5 to 10 next words or another's."""
    draw = random.Random(0)
    paragraphs = [line.split() for line in text.read_text().splitlines() if len(line.split()) > 60]
    draw.shuffle(paragraphs)
    with (folder / "continuation.jsonl").open("w") as file:
        for words in paragraphs[:200]:
            ends = [" ".join(w[40 : 40 + draw.randint(5, 10)]) for w in (words, *draw.sample(paragraphs, 3))]
            gold = draw.randrange(4)
            ends[0], ends[gold] = ends[gold], ends[0]
            file.write(json.dumps({"start": " ".join(words[:40]), "ends": ends, "gold": gold}) + "\n")
    keys = {
        "task": "mp_continuation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "continuation.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "start",
        "doc_to_choice": "ends",
        "doc_to_target": "gold",
    }
    (folder / "continuation.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))


def tokenizer(bos: bool) -> t.PreTrainedTokenizerFast:
    draw = random.Random(1)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator([sentence(draw, 5, 30) for _ in range(400)], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"}
    return t.PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, model_input_names=["input_ids", "attention_mask"]
    )


def opt(size: int) -> t.PreTrainedModel:
    config = t.OPTConfig(vocab_size=size, word_embed_proj_dim=48, num_hidden_layers=3, num_attention_heads=4,
                         ffn_dim=96, init_std=0.2, **IDS)  # fmt: skip
    return t.OPTForCausalLM(config)


def llama(size: int) -> t.PreTrainedModel:
    config = t.LlamaConfig(vocab_size=size, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                           initializer_range=0.2, **IDS)  # fmt: skip
    return t.LlamaForCausalLM(config)


def compare(file: Path, name: str, model: Any, words: Any, harness: HFLM, tasks: TaskManager) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        harness, tasks=[f"mp_{name}"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][f"mp_{name}"], key=lambda sample: sample["doc_id"])
    theirs = [np.array([float(each[0][0]) for each in sample["resps"]]) for sample in samples]
    ours = MultipleChoice(str(file), words, context_length(model.config, words))
    logs = ours.log_likelihoods(lambda batch: model(**batch))
    row: dict[str, Any] = {
        "questions": len(logs),
        "context": [q.context for q in ours.questions] == [s["arguments"][0][0] for s in samples],
        "difference": max(float(np.abs(a - b).max()) for a, b in zip(logs, theirs, strict=True)),
        "mean": float(np.mean([np.abs(each).mean() for each in theirs])),
        "cut": ours.facts["truncated"],
    }
    for score in ours.evaluate(lambda batch: model(**batch)):
        row[score.name] = [score.value, found["results"][f"mp_{name}"][f"{score.name},none"]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained causal LM")
    parser.add_argument("--text", type=Path, help="running text that it has not seen")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        if options.model:
            write_continuations(folder, options.text)
        tasks = TaskManager(include_path=temporary)
        for family, (make, bos) in {"opt": (opt, True), "llama": (llama, False)}.items():
            words = tokenizer(bos)
            model = make(len(words)).eval()
            model.config.name_or_path = words.name_or_path = family
            harness = HFLM(pretrained=model, tokenizer=words, batch_size=16, device="cpu")
            for name in TASKS:
                rows[f"{family}/{name}"] = compare(folder / f"{name}.yaml", name, model, words, harness, tasks)
        if options.model:
            words = t.AutoTokenizer.from_pretrained(options.model)
            model = t.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
            harness = HFLM(pretrained=model, tokenizer=words, batch_size=16, device="cpu")
            name, file = f"{options.model.name}/continuation", folder / "continuation.yaml"
            rows[name] = compare(file, "continuation", model, words, harness, tasks)
    versions = {name: metadata.version(name) for name in ("lm_eval", "mptrain", "torch", "transformers", "datasets")}
    text = json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
    (RESULTS / "multiple_choice.json").write_text(text)
    lines = [
        f"# Multiple choice, against lm-eval {versions['lm_eval']}",
        "",
        "Made by `benchmarks/scores/multiple_choice.py`; opt and llama are random, so they only guess.",
        "ll: log-likelihood of a choice, in nats; cut: choices whose prompt is longer than the model reads.",
        "",
        "| model/task | rows | same prompts | largest ll difference | mean ll | acc, both | acc_norm, both | cut |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        pairs = [f"{100 * row[m][0]:.2f} / {100 * row[m][1]:.2f}" for m in ("acc", "acc_norm")]
        lines.append(
            f"| {name} | {row['questions']} | {'yes' if row['context'] else 'NO'} | {row['difference']:.1e} |"
            f" −{row['mean']:.1f} | {pairs[0]} | {pairs[1]} | {row['cut']} |"
        )
    (RESULTS / "multiple_choice.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
