"""Multiple-choice tasks of lm-eval: what a file means, what is refused, and scores one token at a time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from kit import tiny_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from mptrain.core.errors import DataError, MptrainError
from mptrain.data.lm_eval.questions import MultipleChoice, context_length, read_tasks
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino

MOODS = str(Path(__file__).parents[1] / "kit" / "lm_eval" / "moods.yaml")
ROWS = [
    {"question": "alpha beta gamma", "options": ["delta", "river stone"], "label": 1, "letter": "B"},
    {"question": "the tree of", "options": ["a house", "green", "slow red"], "label": 0, "letter": "A"},
    {"question": "quick blue", "options": ["runs and sleeps", "eats"], "label": 1, "letter": "B"},
    {"question": "in over", "options": ["cloud", "tree house", "of the"], "label": 2, "letter": "C"},
]
TASK = {
    "task": "words",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "options",
    "doc_to_target": "label",
}


def words(bos=True):
    """A byte-level BPE of a few merges: words are several tokens, and begin with the space before them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [f"{row['question']} {' '.join(row['options'])}" for row in ROWS]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(text, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, model_input_names=["input_ids", "attention_mask"], model_max_length=128
    )


SIZES = {"vocab_size": 290, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=128, init_std=0.5)).eval(),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=32, max_position_embeddings=128, initializer_range=0.5)
    ).eval(),
}


def write(folder, rows=ROWS, **keys):
    """A task file with its data; keys that are None are left out."""
    for split in ("test", "train"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in {**TASK, **keys}.items() if v is not None}, sort_keys=False))
    return str(file)


def task(folder, rows=ROWS, bos=True, length=128, **keys):
    return MultipleChoice(write(folder, rows, **keys), words(bos), length)


def reference(model, tokenizer, context, choice):
    """Σ log p of the choice's tokens, each from a call on the tokens before it alone."""
    with_choice, before = tokenizer(context + choice)["input_ids"], tokenizer(context)["input_ids"]
    total = 0.0
    for place in range(len(before), len(with_choice)):
        with torch.no_grad():
            logits = model(torch.tensor([with_choice[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(0)[with_choice[place]])
    return total


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("exported", [False, True])
def test_log_likelihoods_and_accuracies_are_those_of_one_token_at_a_time(family, exported, tmp_path):
    model, tokenizer, questions = MODELS[family](), words(), task(tmp_path)
    expected = [
        np.array([reference(model, tokenizer, f"Question: {r['question']}\nAnswer:", f" {o}") for o in r["options"]])
        for r in ROWS
    ]
    forward = lambda batch: model(**batch)  # noqa: E731
    if exported:
        example = {
            "input_ids": torch.ones(2, 8, dtype=torch.long),
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
        }
        forward = CompiledIr(export_openvino(model, example, tmp_path / "ir", precision="fp32").xml, 1)
    found = questions.log_likelihoods(forward)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4 if exported else 2e-6)
    acc, norm = questions.evaluate(forward)
    assert (acc.name, norm.name, acc.of.name, acc.higher_is_better) == ("acc", "acc_norm", "mean", True)
    assert acc.stats[:, 0].tolist() == [float(e.argmax() == r["label"]) for e, r in zip(expected, ROWS)]
    by_length = [e / [len(o) for o in r["options"]] for e, r in zip(expected, ROWS)]
    assert norm.stats[:, 0].tolist() == [float(e.argmax() == r["label"]) for e, r in zip(by_length, ROWS)]
    assert acc.stats.tolist() != norm.stats.tolist(), "the rows should tell the two apart"


def constant(value):
    """A model with the same logit for every token: each costs log 290."""
    return lambda batch: {"logits": torch.full((*batch["input_ids"].shape, 290), value)}


def test_acc_norm_divides_by_characters_without_the_delimiter(tmp_path):
    """Fewer tokens win acc, fewer to a character acc_norm; to a character of choice and delimiter, the first again."""
    questions = task(tmp_path, [{"question": "q", "options": ["é!", "é" * 24], "label": 0}], target_delimiter=" " * 6)
    counts = np.array([len(r.targets) for r in questions.requests[0]])
    logs = questions.log_likelihoods(constant(0.0))[0]
    np.testing.assert_allclose(logs, -np.log(290) * counts, rtol=1e-6)
    assert counts[0] / 2 > counts[1] / 24 and counts[0] / 8 < counts[1] / 30
    acc, norm = questions.evaluate(constant(0.0))
    assert (acc.value, norm.value) == (1.0, 0.0)


def test_batches_are_bounded_by_the_size_of_their_logits(tmp_path, monkeypatch):
    questions = task(tmp_path)
    widths = []

    def forward(batch):
        widths.append(batch["input_ids"].numel())
        return {"logits": torch.zeros(*batch["input_ids"].shape, len(questions._tokenizer))}

    whole = [score.value for score in questions.evaluate(forward)]
    assert max(widths) > 40
    widths.clear()
    monkeypatch.setattr("mptrain.data.lm_eval.questions.BATCH_BYTES", 4 * len(questions._tokenizer) * 40)
    assert [score.value for score in questions.evaluate(forward)] == whole
    assert max(widths) <= 40 and len(widths) > 1


def test_contexts_that_choices_share_run_once(tmp_path):
    questions = MultipleChoice(MOODS, tiny_tasks._tokenizer(["input_ids", "attention_mask"]), 60)
    assert questions.questions[0].choices == ["very good", "very bad", "very fine"]
    seen = []

    def forward(batch):
        seen.extend(map(tuple, batch["input_ids"].tolist()))
        return {"logits": torch.zeros(*batch["input_ids"].shape, 50)}

    questions.evaluate(forward)
    assert len(seen) == len({r.inputs for each in questions.requests for r in each}) <= 30
    # [CLS] in front once, no [SEP] behind, and what is predicted is the choice alone
    tokenizer = questions._tokenizer
    assert tokenizer.convert_ids_to_tokens(questions.requests[0][0].inputs)[0] == "[CLS]"
    assert tokenizer.decode(questions.requests[0][1].targets) == "very bad"
    assert tokenizer.sep_token_id not in questions.requests[0][0].inputs


# -- what a file means


@pytest.mark.parametrize(
    ("keys", "context", "choices", "gold"),
    [
        ({}, "Question: alpha beta gamma\nAnswer:", ["delta", "river stone"], [1]),
        ({"doc_to_text": "question"}, "alpha beta gamma", ["delta", "river stone"], [1]),
        ({"doc_to_text": "{{question}}\n"}, "alpha beta gamma\n", ["delta", "river stone"], [1]),
        ({"doc_to_text": "{{question | regex_replace('a+', 'A')}}"}, "AlphA betA gAmmA", ["delta", "river stone"], [1]),
        ({"doc_to_choice": "{{[options[1], 'x', question]}}"}, None, ["river stone", "x", "alpha beta gamma"], [1]),
        ({"doc_to_choice": {"a": "no", "b": "yes"}}, None, ["no", "yes"], [1]),
        ({"doc_to_choice": ["A", "B", "C"], "doc_to_target": "letter"}, None, ["A", "B", "C"], [1]),
        ({"doc_to_target": "{{letter}}", "doc_to_choice": ["A", "B", "C"]}, None, ["A", "B", "C"], [1]),
        ({"doc_to_target": "{{1 - label}}"}, None, ["delta", "river stone"], [0]),
        ({"doc_to_target": 0}, None, ["delta", "river stone"], [0]),
        ({"doc_to_target": "{{[0, label]}}"}, None, ["delta", "river stone"], [0, 1]),
        ({"description": "About {{letter}}.\n\n"}, "About B.\n\nQuestion: alpha beta gamma\nAnswer:", None, [1]),
        ({"test_split": None, "validation_split": "train"}, "Question: alpha beta gamma\nAnswer:", None, [1]),
    ],
)
def test_fields_mean_what_they_mean_in_lm_eval(keys, context, choices, gold, tmp_path):
    question = task(tmp_path, ROWS[:3], **keys).questions[0]
    assert context is None or question.context == context
    assert choices is None or question.choices == choices
    assert question.gold == gold


def test_delimiters_and_spaces_decide_the_tokens(tmp_path):
    def pieces(**keys):
        questions = task(tmp_path, **keys)
        first = questions.requests[0][0]
        decode = questions._tokenizer.decode
        return decode(first.inputs[: len(first.inputs) - len(first.targets) + 1]), decode(first.targets)

    assert pieces() == ("</s>Question: alpha beta gamma\nAnswer:", " delta")
    assert pieces(target_delimiter="\n") == ("</s>Question: alpha beta gamma\nAnswer:", "\ndelta")
    assert pieces(target_delimiter="") == ("</s>Question: alpha beta gamma\nAnswer:", "delta")
    assert pieces(doc_to_text="{{question}}  ") == ("</s>alpha beta gamma", "   delta")
    assert pieces(doc_to_text="") == ("</s>", " delta")
    assert pieces(doc_to_text="</s>{{question}}") == ("</s>alpha beta gamma", " delta")


def test_a_tokenizer_without_bos_scores_empty_contexts_from_eos(tmp_path):
    file = write(tmp_path, doc_to_text="")
    tokenizer = words(bos=False)
    assert MultipleChoice(file, tokenizer, 64).requests[0][0].inputs[0] == 1
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"task.yaml: doc_to_text: .* no bos or eos"):
        MultipleChoice(file, tokenizer, 64)


def test_what_is_too_long_loses_its_front(tmp_path):
    whole, cut = task(tmp_path), task(tmp_path, length=12)
    assert cut.longest == 12 and cut.facts["truncated"] > 0 and whole.facts["truncated"] == 0
    for a, b in zip(whole.requests[0], cut.requests[0]):
        assert a.inputs[-12:] == b.inputs and a.targets == b.targets
    with pytest.raises(DataError, match=r"a choice of row \d is longer than the 2 tokens"):
        task(tmp_path, length=2)


def test_includes_are_merged_and_own_keys_win(tmp_path):
    write(tmp_path)
    (tmp_path / "task.yaml").rename(tmp_path / "_template_yaml")
    (tmp_path / "task.yaml").write_text("include: _template_yaml\ntask: other\ndoc_to_text: question\n")
    found = MultipleChoice(str(tmp_path / "task.yaml"), words(), 64)
    assert (found.name, found.questions[0].context) == ("other", "alpha beta gamma")
    (tmp_path / "_template_yaml").write_text("include: task.yaml\n")
    with pytest.raises(DataError, match="includes itself"):
        MultipleChoice(str(tmp_path / "task.yaml"), words(), 64)


@pytest.mark.parametrize("form", ["json array", "csv", "parquet", "saved", "folder", "from here"])
def test_local_data_of_every_form_gives_the_same_questions(form, tmp_path, monkeypatch):
    expected = task(tmp_path)
    keys = {"doc_to_choice": "{{options}}"}
    (tmp_path / "test.jsonl").unlink()
    if form == "json array":
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        keys["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.json")}}
    elif form == "csv":  # cells are typed, as lm-eval has them: label is a number
        Dataset.from_list([{**row, "options": str(row["options"])} for row in ROWS]).to_csv(tmp_path / "rows.csv")
        keys |= {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": ["rows.csv"]}}}
    elif form == "parquet":
        Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
        keys |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": "rows.parquet"}, "test_split": "train"}
    elif form == "saved":
        DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
        keys |= {"dataset_path": str(tmp_path / "saved"), "dataset_kwargs": None}
    elif form == "folder":
        (tmp_path / "folder").mkdir()
        Dataset.from_list(ROWS).to_json(tmp_path / "folder" / "test.jsonl")
        keys |= {"dataset_path": str(tmp_path / "folder"), "dataset_kwargs": None}
    else:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        Path("here.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        keys["dataset_kwargs"] = {"data_files": {"test": "here.jsonl"}}
    (tmp_path / "task.yaml").write_text(
        yaml.safe_dump({k: v for k, v in {**TASK, **keys}.items() if v is not None}, sort_keys=False)
    )
    found = MultipleChoice(str(tmp_path / "task.yaml"), words(), 128)
    assert found.questions == expected.questions
    assert found.hash == expected.hash


def test_changed_data_is_not_served_from_a_cache(tmp_path):
    first = task(tmp_path)
    second = task(tmp_path, [{**row, "label": 0} for row in ROWS])
    assert [q.gold for q in second.questions] == [[0]] * 4 and first.hash != second.hash


# -- few-shot


def shot(row):
    return f"Question: {row['question']}\nAnswer: {row['options'][row['label']]}\n\n"


def test_few_shot_examples_are_those_of_lm_eval(tmp_path):
    asked = [f"Question: {row['question']}\nAnswer:" for row in ROWS]

    def contexts(**keys):
        return [q.context for q in task(tmp_path, num_fewshot=2, **keys).questions]

    first = {"fewshot_config": {"sampler": "first_n"}}
    assert contexts(fewshot_split="train", **first) == [shot(ROWS[0]) + shot(ROWS[1]) + q for q in asked]
    assert contexts(fewshot_split="test", **first)[0] == shot(ROWS[1]) + shot(ROWS[2]) + asked[0]
    draw = random.Random(1234)
    assert contexts(training_split="train") == ["".join(map(shot, draw.sample(ROWS, 2))) + q for q in asked]
    draw = random.Random(1234)
    others = [[r for r in draw.sample(ROWS, 3) if r != row][:2] for row in ROWS]
    assert contexts(fewshot_split="test") == ["".join(map(shot, rows)) + q for rows, q in zip(others, asked)]
    assert contexts(fewshot_split="train", fewshot_delimiter="##", **first)[0].count("##") == 2
    with pytest.raises(DataError, match=r"num_fewshot: 4 is too many for the 4 rows"):
        task(tmp_path, num_fewshot=4, fewshot_split="test")
    with pytest.raises(DataError, match=r"fewshot_split: 'test' is also scored"):
        task(tmp_path, num_fewshot=1)


# -- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output_type": "generate_until"}, "output_type: 'generate_until' is not supported"),
        ({"output_type": None}, "output_type: 'generate_until' is not supported"),
        ({"group": "g"}, "group: this is a group"),
        ({"task": ["a", "b"]}, r"task: got \['a', 'b'\], must be a text"),
        ({"filter_list": [{"name": "x"}]}, "filter_list: .* not supported"),
        ({"generation_kwargs": {"until": []}}, "generation_kwargs: .* not supported"),
        ({"repeats": 3}, "repeats: 3 is not supported"),
        ({"unsafe_code": True}, "unsafe_code: True is not supported"),
        ({"gen_prefix": "A"}, "gen_prefix: 'A' is not supported"),
        ({"process_docs": "x"}, "process_docs: 'x' is not supported"),
        ({"doc_to_txt": "x"}, "doc_to_txt: no key that is known here; did you mean doc_to_text"),
        ({"metric_list": [{"metric": "acc_mutual_info"}]}, "metric_list: the metric 'acc_mutual_info'"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "metric_list.aggregation: 'median' of acc"),
        ({"metric_list": []}, "metric_list: names"),
        ({"fewshot_config": {"samples": []}}, "fewshot_config.samples: is not supported"),
        ({"fewshot_config": {"sampler": "balanced"}}, "fewshot_config.sampler: 'balanced'"),
        ({"num_fewshot": -1}, "num_fewshot: got -1"),
        ({"doc_to_choice": None}, "doc_to_choice: is missing"),
        ({"doc_to_choice": [True, False]}, r"doc_to_choice: gives \[True, False\] .*row 1 of split 'test'"),
        ({"doc_to_choice": "question"}, "doc_to_choice: gives 'alpha beta gamma'"),
        ({"doc_to_choice": "{{question}}"}, "doc_to_choice: gives 'alpha beta gamma', which is not a list"),
        ({"doc_to_target": "{{label + 7}}"}, "doc_to_target: gives 8, which is no index"),
        ({"doc_to_target": "question"}, "doc_to_target: gives 'alpha beta gamma'"),
        ({"doc_to_target": -1}, "doc_to_target: gives -1"),
        ({"doc_to_text": "{{label}}"}, "doc_to_text: gives '1'; numbers"),
        (
            {"doc_to_text": "{{nothing}}"},
            "doc_to_text: the template .* 'nothing' is undefined; the columns are question",
        ),
        ({"doc_to_text": "{{question"}, "doc_to_text: the template"),
        ({"doc_to_text": "{{question + label}}"}, "doc_to_text: the template .* TypeError"),
        ({"test_split": None}, "test_split: is missing"),
        ({"test_split": "dev"}, "the data has no split 'dev'; its splits are test, train"),
        ({"dataset_kwargs": None}, "dataset_kwargs.data_files: is missing"),
        ({"dataset_kwargs": {"data_files": "no.jsonl"}}, "data_files: there is no file .*no.jsonl"),
        ({"dataset_kwargs": {"data_files": "https://x.org/a.jsonl"}}, "must be the path of a local file"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "dataset_kwargs.trust_remote_code: True"),
        ({"dataset_kwargs": {"field": "x"}}, "dataset_kwargs.field: 'x' is not supported"),
        ({"dataset_path": "./no/where", "dataset_kwargs": None}, "dataset_path: there is no folder"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_key(keys, message, tmp_path):
    with pytest.raises(DataError, match=rf"task.yaml: .*{message}"):
        task(tmp_path, **keys)


def test_an_unreachable_hub_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataError, match=r"dataset_path: some/hub \(main\) .*no network.*save_to_disk"):
        task(tmp_path, dataset_path="some/hub", dataset_name="main", dataset_kwargs=None)


def test_nothing_in_a_task_file_runs(tmp_path):
    trap = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(trap)!r}, 'w')\ndef f(doc): return doc\n")
    file = Path(write(tmp_path))
    text = file.read_text()
    for line, message in (
        ("process_docs: !function utils.f", "process_docs: !function utils.f is Python code"),
        ("metric_list: [{metric: !function utils.f}]", "metric_list: !function utils.f is Python code"),
        ("description: !!python/object/apply:os.system ['touch ran']", "cannot be read as YAML"),
        ("description: a\ndescription: b", "'description' is given twice"),
    ):
        file.write_text(f"{text}{line}\n")
        with pytest.raises(DataError, match=message):
            MultipleChoice(str(file), words(), 64)
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ options.append('x') }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{% include 'utils.py' %}",
    ):
        with pytest.raises(DataError, match="doc_to_text: the template"):
            task(tmp_path, doc_to_text=template)
    with pytest.raises(DataError, match=r"doc_to_choice: gives .* not a list"):
        task(tmp_path, doc_to_choice="{{ \"[__import__('os').system('touch ran')]\" }}")
    # keys without effect are not looked at, and so not run either
    file.write_text(f"{text}doc_to_decontamination_query: !function utils.f\n")
    assert len(MultipleChoice(str(file), words(), 64).questions) == 4
    assert not trap.exists() and not Path("ran").exists()


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    with pytest.raises(MptrainError, match="words: the model's logits are not finite"):
        task(tmp_path).evaluate(constant(float("nan")))


def test_two_tasks_of_one_name_are_an_error(tmp_path):
    file = write(tmp_path)
    with pytest.raises(DataError, match="are both named 'words'"):
        read_tasks([file, file], words(), 64)


def test_the_length_is_the_models(tmp_path):
    tokenizer = words()
    assert context_length(OPTConfig(max_position_embeddings=32), tokenizer) == 32
    assert context_length(OPTConfig(max_position_embeddings=4096), tokenizer) == 128
    tokenizer.model_max_length = int(1e30)
    assert context_length(MambaConfig(), tokenizer) == 2048
