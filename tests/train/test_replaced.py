"""Texts with some tokens replaced: which may go, what takes their place, and what the student and teacher read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from mptrain import Trainer, TrainingArguments
from mptrain.core.errors import ModelError
from mptrain.recipe import Distill
from mptrain.train.distill import Distiller
from mptrain.train.replaced import replaced

PAD, BEGIN, END = 0, 1, 2


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """64 of 12 tokens between 10 and 59, and some padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 60, (64, 14), generator=generator)
    ids[:, 0] = BEGIN
    lengths = torch.randint(6, 15, (64,), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length - 1], ids[row, length:] = END, PAD
    return ids, (torch.arange(14) < lengths[:, None]).long()


def test_as_many_go_as_asked_and_what_frames_a_text_stays():
    ids, mask = texts()
    torch.manual_seed(1)
    found = replaced(ids, mask, 0.5)
    special = (ids == BEGIN) | (ids == END) | (mask == 0)
    assert torch.equal(found[special], ids[special]) and not (found[~special] < 10).any()
    changed = (found != ids)[~special].float().mean()
    assert 0.44 < changed < 0.54, "half of them, of which one in fifty draws itself"
    assert torch.equal(replaced(ids, mask, 0.0), ids) and torch.equal(ids, texts()[0])


def test_they_are_drawn_as_often_as_the_batch_has_them():
    ids = torch.tensor([[5, 5, 5, 7]] * 2000 + [[6, 6, 6, 6]])
    torch.manual_seed(0)
    found = replaced(ids, None, 0.999)
    assert abs((found == 5).float().mean() - 0.75) < 0.02 and abs((found == 7).float().mean() - 0.25) < 0.02


def test_what_all_texts_share_is_left_and_the_draw_is_torchs():
    same = torch.tensor([[3, 4, 5], [5, 3, 4]])
    assert torch.equal(replaced(same, None, 0.9), same) and torch.equal(replaced(same[:1], None, 0.9), same[:1])
    ids, mask = texts()
    torch.manual_seed(7)
    first = replaced(ids, mask, 0.3)
    torch.manual_seed(7)
    assert torch.equal(first, replaced(ids, mask, 0.3)) and not torch.equal(first, replaced(ids, mask, 0.3))


def test_rows_that_are_no_tokens_are_refused():
    with pytest.raises(ModelError, match=r"replace_tokens: input_ids of shape \(2, 3, 4\)"):
        replaced(torch.zeros(2, 3, 4, dtype=torch.long), None, 0.1)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Recording(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.read = inner, []
        self.config = inner.config

    def forward(self, **inputs):
        self.read.append(inputs["input_ids"].clone())
        return self.inner(**inputs)


def test_student_and_teacher_read_the_same_and_validation_what_there_is(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, **SIZES)
    student, teacher = (Recording(BertForSequenceClassification(config)) for _ in range(2))
    ids, mask = texts()
    rows = [{"input_ids": i, "attention_mask": m, "labels": n % 2} for n, (i, m) in enumerate(zip(ids, mask))]
    settings = TrainingArguments(str(tmp_path), num_train_epochs=1, remove_unused_columns=False, use_cpu=True)
    distiller = Distiller(teacher, Distill(replace_tokens=0.3))
    trainer = Trainer(student, settings, train_dataset=rows, distiller=distiller)
    trainer.train()
    trainer.evaluate(rows)
    taught = torch.cat(teacher.read)
    assert torch.equal(taught, torch.cat(student.read)[: len(taught)])
    whole = {tuple(row.tolist()) for row in ids}
    assert sum(tuple(row.tolist()) in whole for row in taught) < len(taught) / 4
    assert all(tuple(row.tolist()) in whole for row in torch.cat(student.read)[len(taught) :])


def test_a_training_that_is_resumed_draws_what_it_would_have(tmp_path):
    config = BertConfig(vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    ids, mask = texts()
    rows = [{"input_ids": i, "attention_mask": m, "labels": n % 2} for n, (i, m) in enumerate(zip(ids, mask))]

    def trained(resumed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        teacher, student = BertForSequenceClassification(config), BertForSequenceClassification(config)
        settings = TrainingArguments(
            str(tmp_path), max_steps=12, save_steps=5, learning_rate=1e-2, remove_unused_columns=False, use_cpu=True
        )
        distiller = Distiller(teacher, Distill(replace_tokens=0.3))
        trainer = Trainer(student, settings, train_dataset=rows, distiller=distiller)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resumed else None)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(trained(resumed=False), trained(resumed=True))


def test_targets_of_each_token_are_refused():
    config = BertConfig(vocab_size=60, **SIZES)
    distiller = Distiller(BertForTokenClassification(config), Distill(replace_tokens=0.1))
    ids, mask = texts()
    with pytest.raises(ModelError, match="targets are those of each token"):
        distiller.shown({"input_ids": ids, "attention_mask": mask, "labels": ids})
    distiller.shown({"input_ids": ids, "attention_mask": mask, "labels": ids.float()})  # as many labels as tokens
    with pytest.raises(ModelError, match="has no input_ids"):
        distiller.shown({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)})
