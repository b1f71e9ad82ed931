"""The script of docs/trainer.md runs as it is printed, but for the number of steps."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from kit import tiny
from transformers import AutoModelForSequenceClassification

import mptrain

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(4, 12, (64, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": i % 2}


def test_the_guide_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    code = code.replace('"end": 40', '"end": 4').replace("max_steps=100", "max_steps=10")
    code = code.replace("learning_rate", "use_cpu=True, report_to=[], disable_tqdm=True, learning_rate")
    assert len([line for line in code.splitlines() if line]) <= 10 and code.count("boundary()") == 1
    monkeypatch.chdir(tmp_path)
    folder = tiny.save_bert(tmp_path / "bert")
    model, teacher = (AutoModelForSequenceClassification.from_pretrained(folder) for _ in range(2))
    data = Rows()
    batches = [{k: v[:8] for k, v in {"input_ids": data.ids, "attention_mask": torch.ones_like(data.ids)}.items()}]
    names = {"model": model, "teacher": teacher, "data": data, "batches": batches, "tokenizer": tiny.tokenizer()}
    exec(compile(code, str(GUIDE), "exec"), names)
    loaded = mptrain.load(tmp_path / "out" / "jpqd")
    assert loaded.config.mptrain_structure["blocks"]
    trained = names["trainer"].model.eval()
    assert torch.equal(loaded(**batches[0]).logits, trained(**batches[0]).logits)
