"""What a tokenizer does not know is counted, named, and too much of it is an error."""

import json

import pytest
from kit.tiny import WORDS, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.recipe import Data


def texts(unknown):
    """240 texts of 10 words, of which every tenth text has `unknown` words that no one knows."""
    rows = []
    for i in range(240):
        words = [WORDS[(i + j * (1 + i % 7)) % len(WORDS)] for j in range(10)]
        if i % 10 == 0:
            words[:unknown] = [f"zyx{i}w{j}" for j in range(unknown)]
        rows.append({"text": " ".join(words), "label": "ab"[i % 2]})
    return rows


def load(tmp_path, rows, ours=None, task="text-classification", **fields):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = dict.fromkeys(("train", "validation", "test"), str(file))
    return load_data(Data(**same, max_length=32, **fields), task, ours or tokenizer(), seed=0)


@pytest.mark.parametrize(("unknown", "warned"), [(0, False), (1, False), (2, True), (10, True)])
def test_the_share_is_a_fact_and_above_one_percent_a_warning(tmp_path, caplog, unknown, warned):
    data = load(tmp_path, texts(unknown))
    share = unknown / 100
    assert data.facts["unknown_tokens"] == dict.fromkeys(("train", "validation", "test"), pytest.approx(share))
    assert ("unknown to the tokenizer (such as 'zyx0w0'" in caplog.text) == warned
    if warned:
        assert f"data: {100 * share:.1f}% of the tokens of test are unknown" in caplog.text


def test_more_than_a_fifth_is_an_error_unless_it_is_allowed(tmp_path):
    rows = [{"text": f"good zyx{i} film abc{i}", "label": "ab"[i % 2]} for i in range(40)]
    said = r"data.max_unknown: 50.0% of the tokens of train are unknown to the tokenizer \(such as 'zyx0', 'abc0'"
    with pytest.raises(DataError, match=said + ".*, more than 20%.*own tokenizer.*at least 0.50"):
        load(tmp_path, rows)
    assert load(tmp_path, rows, max_unknown=0.5).facts["unknown_tokens"]["train"] == 0.5


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "causal-lm"])
def test_every_task_that_reads_text_counts(tmp_path, task):
    rows = [
        {
            "text": "good zyx film abc",
            "tokens": ["good", "zyx", "film", "abc"],
            "tags": ["A", "B", "A", "B"],
            "question": "zyx abc",
            "context": f"good zyx film {'abc ' * (1 + i % 2)}",
            "answers": {"text": ["good"], "answer_start": [0]},
        }
        for i in range(30)
    ]
    with pytest.raises(DataError, match=r"data.max_unknown: [5-7]\d.\d% of the tokens of train are unknown"):
        load(tmp_path, rows, task=task, **({"stride": 4} if task == "question-answering" else {}))


def test_special_tokens_around_a_text_are_no_part_of_it(tmp_path):
    """As in GPT-2, whose unknown token is also that of the end: only what stands for text is counted."""
    ours = tokenizer()
    ours.unk_token = "[SEP]"
    data = load(tmp_path, texts(0), ours)
    assert data.facts["unknown_tokens"] == {"train": 0.0, "validation": 0.0, "test": 0.0}


def test_characters_that_a_vocabulary_without_unknown_leaves_out_are_counted(tmp_path):
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", *"abcdefgh"])}, []))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    rows = [{"text": f"abc {'def'[: 1 + i % 3]} xyz", "label": "ab"[i % 2]} for i in range(60)]
    with pytest.raises(
        DataError, match=r"37.5% of the characters of train are unknown to the tokenizer \(such as 'x', 'y', 'z'"
    ):
        load(tmp_path, rows, letters)
