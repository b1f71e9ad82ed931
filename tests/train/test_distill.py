"""The distillation loss against its definition written out by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from mptrain.core.errors import ModelError
from mptrain.data.tasks.divergence import kl_divergence, of_logits
from mptrain.recipe import Distill
from mptrain.train.distill import Distiller, check_terms


def test_kl_divergence_is_the_definition():
    student, teacher, t = [1.0, -2.0], [0.5, 0.25], 3.0
    p = [math.exp(x / t) for x in teacher]
    q = [math.exp(x / t) for x in student]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    expected = t * t * sum(a * math.log(a / b) for a, b in zip(p, q))
    got = kl_divergence(torch.tensor([student]), torch.tensor([teacher]), t)
    assert float(got) == pytest.approx(expected, rel=1e-5)


class Fixed(nn.Module):
    """A teacher with given outputs."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, **inputs):
        assert "labels" not in inputs
        return self.outputs


def test_loss_is_mixed_by_weight():
    logits = torch.randn(4, 3)
    terms = Distiller(Fixed(logits=torch.randn(4, 3)), Distill(weight=0.75))(
        {"labels": torch.zeros(4)}, {"logits": logits}, torch.tensor(2.0)
    )
    assert float(terms.total) == pytest.approx(0.25 * 2.0 + 0.75 * float(terms.distill))
    assert float(terms.task) == 2.0


def test_only_labelled_positions_count():
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    labels = torch.tensor([[1, -100, 2, -100, -100], [-100, 0, -100, -100, -100]])
    terms = Distiller(Fixed(logits=teacher), Distill(weight=1, temperature=1))(
        {"labels": labels}, {"logits": student}, torch.tensor(0.0)
    )
    keep = labels != -100
    assert float(terms.total) == pytest.approx(float(kl_divergence(student[keep], teacher[keep], 1.0)))


def test_causal_models_compare_the_logits_that_predict_the_next_label():
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    labels = torch.tensor([[-100, -100, 3, 4]])
    terms = Distiller(Fixed(logits=teacher), Distill(weight=1, temperature=1), term=partial(of_logits, causal=True))(
        {"labels": labels}, {"logits": student}, torch.tensor(0.0)
    )
    assert float(terms.total) == pytest.approx(float(kl_divergence(student[:, 1:3], teacher[:, 1:3], 1.0)))


def config(**kwargs):
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=50, **kwargs
    )


def test_hidden_and_attention_terms_vanish_only_for_equal_models():
    model = BertForSequenceClassification._from_config(config(), attn_implementation="eager").eval()
    wide = config(initializer_range=1.0)
    other = BertForSequenceClassification._from_config(wide, attn_implementation="eager").eval()
    batch = {
        "input_ids": torch.randint(0, 50, (2, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "labels": torch.tensor([0, 1]),
    }
    for hidden, attention in ((1.0, 0.0), (0.0, 1.0)):
        settings = Distill(weight=0, hidden=hidden, attention=attention)
        same, differs = Distiller(model, settings), Distiller(other, settings)
        outputs = model(**batch, **same.extra_outputs())
        assert float(same(batch, outputs, outputs["loss"]).total) == pytest.approx(float(outputs["loss"]))
        assert float(differs(batch, outputs, outputs["loss"]).total) > float(outputs["loss"]) + 1e-4


@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_both_halves_of_an_encoder_decoder_are_compared(term):
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
    sizes |= {"decoder_ffn_dim": 16, "vocab_size": 40, "max_position_embeddings": 16, "decoder_layers": 1}
    student, teacher = (
        BartForConditionalGeneration(BartConfig(encoder_layers=n, attn_implementation="eager", **sizes)).eval()
        for n in (1, 2)
    )
    batch = {
        "input_ids": torch.randint(4, 40, (2, 5)),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
        "labels": torch.tensor([[5, 6, 7, 8], [9, 2, -100, -100]]),
    }
    distiller = Distiller(teacher, Distill(weight=0, **{term: 1.0}))
    with torch.no_grad():
        start = student.prepare_decoder_input_ids_from_labels(batch["labels"])
        ours = student(**batch, **distiller.extra_outputs())
        plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": start}
        theirs = teacher(**plain, **distiller.extra_outputs())
        read, written = batch["attention_mask"], (batch["labels"] != -100).long()
        if term == "hidden":
            (a, b), (c, _, e) = ours.encoder_hidden_states, theirs.encoder_hidden_states
            pairs = [(a, c, read), (b, e, read)]
            pairs += [(s, t, written) for s, t in zip(ours.decoder_hidden_states, theirs.decoder_hidden_states)]
            terms = [((s - t).pow(2).mean(-1) * mask).sum() / mask.sum() for s, t, mask in pairs]
        else:
            masks = {"encoder": (read, read), "decoder": (written, written), "cross": (written, read)}
            terms = []
            for name, (rows, columns) in masks.items():
                error = (ours[f"{name}_attentions"][-1].mean(1) - theirs[f"{name}_attentions"][-1].mean(1)).pow(2)
                both = rows[:, :, None] * columns[:, None, :]
                terms.append((error * both).sum() / both.sum())
        got = distiller(batch | {"decoder_input_ids": start}, ours, torch.tensor(0.0)).total
    assert float(got) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-5)


def test_what_a_model_does_not_give_is_said():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ModelError, match=r"distill\.attention needs attention maps: set model\.attn: eager"):
        check_terms(Distill(attention=1.0), BertForSequenceClassification(config()), batch, pruned=False)
    with pytest.raises(ModelError, match=r"distill\.hidden: .* no hidden states"):
        check_terms(Distill(hidden=1.0), Fixed(logits=torch.zeros(2, 3)), {}, pruned=False)
    pictures = Fixed(hidden_states=(torch.zeros(2, 3, 4, 4),))
    check_terms(Distill(hidden=1.0), pictures, {}, pruned=False)
    with pytest.raises(ModelError, match=r"distill\.hidden: pruning cuts the channels"):
        check_terms(Distill(hidden=1.0), pictures, {}, pruned=True)


def test_a_teacher_that_gives_nan_is_named():
    teacher = BertForSequenceClassification(config())
    teacher.classifier.bias.data[0] = float("nan")
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ModelError, match=r"teacher's logits are nan: 1 of its .* \(first: classifier\.bias\)"):
        Distiller(teacher, Distill())(batch, {"logits": torch.zeros(2, 2)}, torch.tensor(0.0))


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def hidden_term(student, teacher, **extra):
    settings = Distill(weight=0, **{extra.pop("name", "hidden"): 1.0})
    key = "hidden_states" if settings.hidden else "attentions"
    inputs = {"attention_mask": MASK, "labels": torch.zeros(2)}
    outputs = {"logits": torch.zeros(2, 3), key: (student,)}
    taught = Fixed(logits=torch.zeros(2, 3), **{key: (teacher,)})
    return float(Distiller(taught, settings)(inputs, outputs, torch.tensor(0.0)).total)


def test_states_of_a_wider_teacher_are_compared_by_the_cosines_of_tokens():
    student, turn = torch.randn(2, 4, 8), torch.linalg.qr(torch.randn(16, 16)).Q[:8]
    assert hidden_term(student, 3.0 * student @ turn) == pytest.approx(0.0, abs=1e-10), "turned and longer, in 16"
    teacher = torch.randn(2, 4, 16)
    errors = []
    for row, length in enumerate((4, 2)):
        for i in range(length):
            for j in range(length):
                ours = torch.cosine_similarity(student[row, i], student[row, j], dim=0)
                errors.append(float(ours - torch.cosine_similarity(teacher[row, i], teacher[row, j], dim=0)) ** 2)
    assert hidden_term(student, teacher) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("width", [8, 16])
def test_padding_counts_in_no_term(width):
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, width)
    before = hidden_term(student, teacher)
    teacher[1, 2:], student[1, 2:] = 7.0, -7.0
    assert hidden_term(student, teacher) == pytest.approx(before, rel=1e-6)


def test_attention_to_and_from_padding_does_not_count():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    before = hidden_term(student, teacher, name="attention")
    teacher[1, :, 2:], student[1, :, :, 2:] = 1.0, 0.0
    assert hidden_term(student, teacher, name="attention") == pytest.approx(before, rel=1e-6)
    assert before == pytest.approx(
        float((student.mean(1) - teacher.mean(1)).pow(2)[MASK[:, :, None] * MASK[:, None] > 0].mean()), rel=1e-5
    )


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ModelError, match="reads as many tokens"):
        hidden_term(torch.randn(2, 4, 8), torch.randn(2, 5, 16))


def test_a_teacher_with_other_labels_is_refused():
    teacher = BertForTokenClassification(config(num_labels=3))
    student = BertForTokenClassification(config(num_labels=4))
    batch = {"input_ids": torch.randint(0, 50, (2, 6)), "labels": torch.zeros(2, 6, dtype=torch.long)}
    with pytest.raises(ModelError, match="same labels"):
        Distiller(teacher, Distill())(batch, student(**batch), torch.tensor(0.0))
