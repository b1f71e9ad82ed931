"""A loss is not multiplied by accumulation and ranks, whether the model divides by num_items_in_batch or not."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.training import Rows, arguments, model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mptrain import Trainer
from mptrain.train.loss_items import as_leaf, depends_on


class Words(torch.utils.data.Dataset):
    """Rows of different numbers of labels, so that a mean of means is not the mean."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": torch.where(torch.arange(8) < 2 + i % 6, ids, -100)}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))


def bert():
    return model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def losses(cls, folder, m, data, accumulation, **own):
    torch.manual_seed(2)
    batch = 16 // accumulation
    options = dict(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2, max_grad_norm=0
    )
    trainer = cls(m, arguments(folder, **options), train_dataset=data, **own)
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer


def test_the_graph_tells_whether_a_loss_was_divided():
    weight = torch.ones(3, requires_grad=True)
    leaf = as_leaf(torch.tensor(7), torch.device("cpu"))
    assert depends_on(((weight * 2).sum() / leaf).clone(), leaf)
    assert not depends_on((weight * 2).mean(), leaf)
    assert not depends_on(torch.tensor(1.0), leaf)


@pytest.mark.parametrize("precision", [None, "bf16-master"])
def test_a_classifier_that_ignores_the_number_trains_the_same_with_accumulation(tmp_path, precision, caplog):
    expected, _ = losses(Trainer, tmp_path / "a", bert(), Rows(), 1)
    assert "is the mean of a micro-batch" not in caplog.text
    found, trainer = losses(Trainer, tmp_path / "b", bert(), Rows(), 4)
    assert found == pytest.approx(expected, rel=1e-5)
    assert trainer.model_accepts_loss_kwargs is False
    assert caplog.text.count("the loss of BertForSequenceClassification is the mean of a micro-batch") == 1
    wrong, _ = losses(transformers.Trainer, tmp_path / "c", bert(), Rows(), 4)
    assert wrong[0] == pytest.approx(4 * expected[0], rel=1e-5)


def test_a_language_model_divides_by_the_items_of_all_micro_batches(tmp_path):
    expected, _ = losses(Trainer, tmp_path / "a", gpt2(), Words(), 1)
    found, trainer = losses(Trainer, tmp_path / "b", gpt2(), Words(), 4)
    theirs, _ = losses(transformers.Trainer, tmp_path / "c", gpt2(), Words(), 4)
    assert found == theirs  # to the last digit
    assert trainer.model_accepts_loss_kwargs is True
    assert found == pytest.approx(expected, rel=2e-2)


def test_a_compute_loss_of_the_user_that_ignores_the_number(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return nn.functional.cross_entropy(model(**inputs).logits, labels)

    expected, _ = losses(Own, tmp_path / "a", bert(), Rows(), 1)
    found, _ = losses(Own, tmp_path / "b", bert(), Rows(), 4)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_loss_function_of_the_user_gets_the_number_as_transformers_gives_it(tmp_path):
    given = []

    def loss(outputs, labels, num_items_in_batch=None):
        given.append(num_items_in_batch)
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    expected, _ = losses(Trainer, tmp_path / "a", bert(), Rows(), 1)
    found, _ = losses(Trainer, tmp_path / "b", bert(), Rows(), 4, compute_loss_func=loss)
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(map(int, given)) == {16}
