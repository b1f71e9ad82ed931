"""Relations between tokens against their definition, with heads that differ, and in a run."""

from __future__ import annotations

import pytest
import torch
from kit import tiny
from kit.dropped import without
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mptrain import MasterWeights
from mptrain.compress.structure import find
from mptrain.core.errors import ModelError
from mptrain.recipe import Distill
from mptrain.recipe.file import read
from mptrain.run import run
from mptrain.train.distill import Distiller
from mptrain.train.relations import divergence, paired, projections, recorded

torch.manual_seed(0)


def bert(heads, layers=2, **more):
    size = {"hidden_size": 24, "intermediate_size": 32, "vocab_size": 40, "max_position_embeddings": 16}
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=layers, num_attention_heads=heads, **size, **more)
    ).eval()


def test_it_is_the_definition_and_padding_counts_in_nothing():
    student, teacher = torch.randn(1, 5, 6), torch.randn(1, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    s, t = (torch.softmax(x[0, :3] @ x[0, :3].T / x.shape[-1] ** 0.5, -1) for x in (student, teacher))
    wanted = (t * (t / s).log()).sum(-1).mean()
    torch.testing.assert_close(divergence([student], [teacher], mask), wanted)
    torch.testing.assert_close(divergence([student[:, :3]], [teacher[:, :3]], None), wanted)
    assert float(divergence([teacher], [teacher], mask)) == 0.0


def test_queries_keys_and_values_are_found_where_they_are_made():
    found = projections(bert(4))
    part = "bert.encoder.layer.1.attention.self."
    assert len(found) == 2 and found[1] == [f"{part}query", f"{part}key", f"{part}value"]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8))
    assert projections(gpt2) == [["transformer.h.0.attn.c_attn"]]
    with pytest.raises(ModelError, match="nothing can be cut"):
        projections(nn.Linear(2, 2), {"input": torch.zeros(2, 2)})


def test_a_student_under_masters_is_looked_at_as_it_is_without():
    student, teacher = bert(4, layers=1), bert(4, layers=3)
    batch = {"input_ids": torch.randint(40, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    wanted = paired(student, teacher, batch)
    masters = MasterWeights(student, torch.optim.AdamW(student.parameters()), "bf16")
    find._found.clear()  # it is looked for anew
    assert paired(student, teacher, batch) == wanted
    distiller = Distiller(teacher, Distill(weight=0.0, relations=1.0))
    with distiller.watching(student, batch):
        outputs = student(**batch)
        inside = student.bert(**batch)[0]
    assert inside.dtype == torch.bfloat16, "the hooks of masters act again"
    assert torch.isfinite(distiller(batch, outputs, torch.zeros(())).total)
    assert masters is not None


def test_a_student_with_other_heads_and_fewer_layers_learns_it():
    student, teacher = bert(2, layers=1), bert(6, layers=3)
    distiller = Distiller(teacher, Distill(weight=0.0, relations=1.0))
    batch = {"input_ids": torch.randint(40, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        with distiller.watching(student, batch):
            outputs = student(**batch)
        loss = distiller(batch, outputs, torch.zeros(())).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert not any(module._forward_hooks for module in student.modules())
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=24, vocab_size=40, n_positions=8))
    fused = Distiller(other, Distill(relations=1.0))
    with fused.watching(student, batch):
        outputs = student(**batch)
    with pytest.raises(ModelError, match="the student's attention has 3 projections, the teacher's 1"):
        fused({"input_ids": batch["input_ids"]}, {"logits": torch.zeros(2, 7, 40)}, torch.zeros(()))


def test_attentions_that_pruning_left_out_are_not_compared():
    teacher, student = bert(4), bert(4)
    student.load_state_dict(teacher.state_dict())
    without(student, heads=0, ffn=None)
    batch = {"input_ids": torch.randint(40, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    distiller = Distiller(teacher, Distill(weight=0.0, relations=1.0))
    with distiller.watching(student, batch):
        outputs = student(**batch)
    found = distiller(batch, outputs, torch.zeros(())).total
    names, modules = projections(teacher)[1], {"student": student, "teacher": teacher}
    made = {}
    for name, model in modules.items():
        with recorded(model, [names]) as kept:
            model(**batch)
        (made[name],) = kept()
    torch.testing.assert_close(found, divergence(made["student"], made["teacher"], batch["attention_mask"]))
    without(student, heads=0, ffn=None)  # the one that was left
    with pytest.raises(ModelError, match=r"distill\.relations: pruning has left no attention"):
        paired(student, teacher, batch)


@pytest.mark.long
def test_a_pruned_and_quantized_student_is_trained_with_it(tmp_path):
    described = tiny.jpqd(tmp_path)
    described["stages"][1]["distill"] |= {"relations": 1.0}
    described["gates"] = {"fused_attention": None, "max_drop": None, "agreement": None}
    report = run(read(str(tiny.write(described, tmp_path / "a.yaml"))).recipe)
    assert report["structure"] and any(row.get("distill_loss") for row in report["history"])
