"""Joint means joint: masks, fake quantizers and the distillation loss in one step, and what the boundary keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from mptrain.compress.boundary import cut
from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.find import find_structure
from mptrain.recipe import Distill, Fisher, Qat, Schedule
from mptrain.train.distill import Distiller
from mptrain.train.trainer import Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=96):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, 50, (n, 8), generator=generator)
        self.labels = (self.ids > 25).sum(1) // 5

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i].clamp(max=1)}


def bert():
    torch.manual_seed(1)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    return BertForSequenceClassification(config).eval()


def joint(tmp_path, steps=6):
    teacher = bert()
    batches = [{"input_ids": torch.randint(0, 50, (4, 8))} for _ in range(3)]
    model = quantizers.quantize(copy.deepcopy(teacher), Qat(mode="qat"), batches)
    config = Fisher(method="fisher", keep={"encoder_params": 0.5}, schedule=Schedule(end=steps, unit="step"))
    pruner = FisherPruner(config, structure=find_structure(model), phase_steps=steps, steps_per_epoch=12, lr=1e-3)
    pruner.prepare(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        compressors=[pruner],
        distiller=Distiller(teacher, Distill(weight=0.5)),
    )
    return trainer, pruner, model


def test_masks_quantizers_and_distillation_act_in_one_forward_pass(tmp_path):
    trainer, pruner, model = joint(tmp_path)
    trainer.train()
    # the state in which the next step would run its forward pass
    assert 0.3 < pruner.sparsity() < 0.7
    for name, mask in pruner.masked.masks.items():
        weight = model.get_parameter(name)
        assert (weight[:, ~mask[0]] == 0).all() and (pruner.masked.dense[name][:, ~mask[0]] != 0).any()
    batch = {"input_ids": torch.randint(0, 50, (8, 8)), "labels": torch.randint(0, 2, (8,))}
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "nncf" in n and p.requires_grad}
    assert before, "no trainable quantizer ranges"
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    terms = {name: float(value) for name, value in trainer._terms.items()}
    assert terms["distill_loss"] > 0 and terms["task_loss"] > 0
    assert float(loss.detach()) == pytest.approx(0.5 * terms["task_loss"] + 0.5 * terms["distill_loss"], rel=1e-5)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in before)
    # without the quantizers the same weights give other outputs: they did act
    plain, _, _ = quantizers.detach(copy.deepcopy(model))
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"]}
        assert (plain.eval()(**inputs).logits - model.eval()(**inputs).logits).abs().max() > 1e-6
    rows = [e for e in trainer.state.log_history if "loss" in e]
    assert [r["compress/sparsity"] for r in rows] == sorted(r["compress/sparsity"] for r in rows)
    assert all(r["distill_loss"] >= 0 for r in rows)


def test_at_the_boundary_the_shrunk_quantized_model_is_the_masked_quantized_model(tmp_path):
    trainer, pruner, model = joint(tmp_path)
    trainer.train()
    model.eval()
    inputs = {"input_ids": torch.randint(0, 50, (8, 8))}
    with torch.no_grad():
        masked = model(**inputs).logits
    ranges = {n: t.clone() for n, t in model.state_dict().items() if "nncf" in n}
    shrunk = cut(model, pruner).eval()
    with torch.no_grad():
        assert (shrunk(**inputs).logits - masked).abs().max() <= 1e-5
    assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in bert().parameters())
    # learned ranges are carried over, not made anew
    carried = {n: t for n, t in shrunk.state_dict().items() if "nncf" in n}
    assert carried.keys() == ranges.keys()
    for name, tensor in carried.items():
        assert torch.isin(tensor, ranges[name]).all(), name
