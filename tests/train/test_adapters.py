"""PEFT LoRA under `precision`: a base in half or fp32, adapters with fp32 masters, saved as PEFT saves them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from kit.long import except_for
from kit.training import Rows, arguments, masters, model, same
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mptrain import MasterWeights, Trainer

DTYPES = {"bf16-master": torch.bfloat16, "fp16-master": torch.float16, "bf16-split": torch.bfloat16}


def base(family="bert", seed=1):
    if family == "bert":
        return model(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def lora(m, family="bert", seed=3):
    torch.manual_seed(seed)
    if family == "bert":
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, target_modules=["query", "value"])
    else:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(m, config)


class Words(Rows):
    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(folder, m, family="bert", precision=None, resume=None, **kwargs):
    torch.manual_seed(2)
    kwargs = dict(max_steps=6, learning_rate=1e-2) | kwargs
    data = Rows() if family == "bert" else Words()
    t = Trainer(m, arguments(folder, precision=precision, **kwargs), train_dataset=data)
    t.train(resume_from_checkpoint=resume)
    return t


def losses(t):
    return [e["loss"] for e in t.state.log_history if "loss" in e]


@pytest.mark.parametrize("family", except_for(["bert", "llama"], ["bert"]))
@pytest.mark.parametrize("base_dtype", ["fp32", "half"])
@pytest.mark.parametrize("precision", except_for(DTYPES, ["fp16-master", "bf16-master"]))
def test_adapters_train_as_in_fp32(tmp_path, family, base_dtype, precision):
    """The loss is computed in fp32 inside PEFT's wrapper: bf16's own steps at 1.7 are 0.008 apart."""
    dtype = DTYPES[precision]
    rounded = base(family)
    if base_dtype == "half":
        rounded = rounded.to(dtype)
    expected = losses(train(tmp_path / "a", lora(copy.deepcopy(rounded).float(), family), family))
    t = train(tmp_path / "b", lora(rounded, family), family, precision)
    assert losses(t) == pytest.approx(expected, rel=2e-3 if dtype == torch.bfloat16 else 3e-4)
    trained = {n for n, p in t.model.named_parameters() if p.requires_grad}
    found = masters(t)
    assert trained <= set(found) and all(found[n].dtype == torch.float32 for n in trained)
    assert (set(found) == trained) == (base_dtype == "half")  # a base in half has no masters
    assert t.master_weights.skipped_steps == 0


@pytest.mark.parametrize("precision", DTYPES)
def test_the_loss_of_a_step_is_fp32_under_peft(precision):
    m = lora(base())
    mw = MasterWeights(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]), DTYPES_SHORT[precision])
    rows = [Rows()[i] for i in range(8)]
    out = m(input_ids=torch.stack([r["input_ids"] for r in rows]), labels=torch.stack([r["labels"] for r in rows]))
    exact = torch.nn.functional.cross_entropy(out.logits.double(), torch.stack([r["labels"] for r in rows]))
    assert out.loss.dtype == torch.float32 and out.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    mw.backward(out.loss)
    assert mw.step()


DTYPES_SHORT = {"bf16-master": "bf16", "fp16-master": "fp16", "bf16-split": "bf16"}


@pytest.mark.parametrize("base_dtype", ["fp32", "half"])
@pytest.mark.parametrize("precision", DTYPES)
def test_adapters_are_saved_in_fp32_and_load_in_peft(tmp_path, precision, base_dtype):
    start = base().to(DTYPES[precision]) if base_dtype == "half" else base()
    t = train(tmp_path / "run", lora(copy.deepcopy(start)), precision=precision, save_strategy="steps", save_steps=3)
    t.save_model(tmp_path / "saved")
    t.model.save_pretrained(tmp_path / "direct")
    found = masters(t)
    for folder in ("saved", "direct"):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert tensors and {x.dtype for x in tensors.values()} == {torch.float32}
        names = {n.replace(".default", "").replace(".modules_to_save", ""): m for n, m in found.items()}
        assert all(torch.equal(x, names[n]) for n, x in tensors.items())
        assert sum(x.numel() for x in tensors.values()) == sum(
            p.numel() for p in t.model.parameters() if p.requires_grad
        )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "saved")
    again_names = dict(again.named_parameters())
    for n, p in t.model.named_parameters():
        if p.requires_grad:  # PEFT makes adapters fp32, and leaves a head (modules_to_save) in the base's dtype
            assert torch.equal(again_names[n], found[n].to(again_names[n].dtype)), n
            assert again_names[n].dtype == torch.float32 or "lora" not in n
    merged = copy.deepcopy(t.model).merge_and_unload()
    kind = DTYPES[precision] if base_dtype == "half" else torch.float32
    assert merged.bert.encoder.layer[0].attention.self.query.weight.dtype == kind


@pytest.mark.parametrize("base_dtype", except_for(["fp32", "half"], ["half"]))
@pytest.mark.parametrize("precision", except_for(DTYPES, ["bf16-split"]))
def test_adapters_resume_bit_for_bit_from_small_checkpoints(tmp_path, precision, base_dtype):
    def start():
        return lora(base().to(DTYPES[precision]) if base_dtype == "half" else base())

    whole = train(tmp_path / "whole", start(), precision=precision)
    train(tmp_path / "part", start(), precision=precision, save_strategy="steps", save_steps=3)
    folder = tmp_path / "part" / "checkpoint-3"
    trained = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    size = (folder / "optimizer.safetensors").stat().st_size
    assert 12 * trained <= size < 12 * trained + 6000  # masters and two moments of the adapters; nothing of the base
    m = start()
    for p in m.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    resumed = train(tmp_path / "part", m, precision=precision, resume=str(folder))
    assert same(masters(resumed), masters(whole))
    assert losses(resumed)[-3:] == losses(whole)[-3:]


def test_a_base_in_half_takes_two_bytes_a_parameter():
    m = lora(base().bfloat16())
    mw = MasterWeights(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]), "bf16")
    trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    frozen = [p for p in m.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert sum(f.numel for f in mw.flats) < trained + 16 * len(list(m.parameters()))
