"""`mptrain inspect`: predictions beside what is really allocated, patterns beside what training then does."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from kit import tiny, tiny_models
from kit.structures import keep
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import mptrain
from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.models.samples import guess_task
from mptrain.precision import memory
from mptrain.precision.half import in_half, pattern
from mptrain.precision.loop import MasterWeights
from mptrain.precision.policy import Policy, kept_in_fp32
from mptrain.recipe import MixedPrecision, Ptq
from mptrain.verify.overflow import compare, search
from mptrain.verify.programs.modules import HalfModules

# -- memory


def storages(tensors):
    """Bytes of the storages behind tensors, each counted once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values()
    )


@pytest.mark.parametrize("keep", [(), ("norms",)], ids=["all", "norms kept"])
@pytest.mark.parametrize("precision", ["fp16-master", "bf16-master", "bf16-split", "bf16-split-int8"])
def test_predicted_memory_is_what_masters_allocate(precision, keep):
    model = tiny_models.tiny("opt", tie_word_embeddings=True)
    model.tie_weights()
    assert len(dict(model.named_parameters(remove_duplicate=False))) > len(dict(model.named_parameters()))
    found = memory.predict(model, precision, keep)
    compute, master, moments = memory.PRECISIONS[precision]
    optimizer = torch.optim.AdamW(model.parameters())
    mw = MasterWeights(model, optimizer, compute, master=master, keep_fp32=keep, kernel="torch", moments=moments)
    loss = model(**tiny_models.inputs("opt", labels=True)).loss
    mw.backward(loss)
    gradients = sum(p.grad.nbytes for p in model.parameters())
    mw.step()
    half = [f for f in mw.flats if f.dtype != torch.float32]
    fp32 = [f for f in mw.flats if f.dtype == torch.float32]
    assert found.weights == storages([*(f.half for f in half), *(f.master for f in fp32)])
    padding = sum((f.numel - sum(e.numel for e in f.entries)) * f.dtype.itemsize for f in mw.flats)
    assert found.weights - padding == storages(model.parameters())
    assert found.masters == storages(f.master for f in half)
    assert found.remainders == storages(f.low for f in half)
    assert found.gradients == gradients
    assert found.moments == storages(t for f in mw.flats for t in f.states.values())
    assert found.kept_fp32 == sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert bool(keep) == (found.kept_fp32 > 0)


def test_fp32_takes_sixteen_bytes_a_parameter():
    model = nn.Linear(64, 64)
    found = memory.predict(model, "fp32")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    assert found.total == storages([*model.parameters(), *(p.grad for p in model.parameters()), *moments])
    assert found.per_parameter == 16
    assert [memory.predict(model, p).per_parameter for p in list(memory.PRECISIONS)[1:]] == [16, 16, 14, 8 + 2 / 64]


# -- modules in half precision


class Norm(nn.Module):
    """An RMS norm that computes in the dtype it gets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    def __init__(self, norm=1):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), Norm()) for _ in range(12))
        with torch.no_grad():
            self.layers[norm][0].weight.mul_(2000)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_module_is_named_so_that_no_other_is_kept():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 32)
    found = search(HalfModules(model, [{"x": x}]))
    assert found.before.finite and not found.before.right(), "wrong without NaN"
    assert found.keep == ("layers.1.1",)
    patterns = [pattern(name) for name in found.keep]
    kept = kept_in_fp32(model, Policy("fp16", keep_fp32=patterns)).parameters
    assert kept == {id(model.layers[1][1].weight)}, "not layers.11.1"
    with torch.no_grad():
        expected, got = model(x), in_half(model, patterns)(x)
    assert compare({"o": expected}, {"o": got}).right()
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Large(nn.Module):
    """Values that no choice of modules can save: they arise in the model's own forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x) * 1e6 / 1e6)


def test_what_modules_cannot_save_keeps_them_all():
    torch.manual_seed(0)
    found = search(HalfModules(Large().eval(), [{"x": torch.randn(4, 8)}]))
    assert not found.before.finite and set(found.keep) == {"first", "last"}


# -- the command


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A BERT whose first FFN makes values of about 1e6, which its layer norm takes back."""
    folder = tiny.save_bert(tmp_path_factory.mktemp("model") / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(3e7)
    model.save_pretrained(folder)
    data = folder.parent / "reviews.txt"
    data.write_text("\n".join("good film the plot was so awful".rsplit(" ", n)[0] for n in range(6)) + "\n")
    return folder, data


def run(*arguments):
    return main(["inspect", *map(str, arguments)])


def test_inspect_names_what_training_then_keeps(overflowing, tmp_path, capsys):
    folder, data = overflowing
    out = tmp_path / "facts.json"
    assert run(folder, "--data", data, "--samples", 6, "--precision", "fp16-master", "--json", out) == 0
    shown = capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert facts["task"] == "text-classification" and facts["inputs"] == {
        "source": "reviews.txt", "examples": 6, "batches": 1
    }  # fmt: skip
    export, training = facts["export"], facts["training"]["fp16"]
    assert not export["before"]["finite"] and export["before"]["max_diff"] is None and export["after"]["right"]
    assert export["keep"] and all("encoder.layer.0.output" in op for op in export["keep"])
    assert training["keep_fp32"] == [r"re:^bert\.encoder\.layer\.0\.output\."] and training["after"]["right"]
    written = yaml.safe_load(shown[shown.index("precision:") :].partition("\nWritten")[0])
    assert MixedPrecision.model_validate(written["precision"]).keep_fp32 == training["keep_fp32"]
    assert "Memory" in shown and "Ranges of" in shown and "times as fast as in fp32" in " ".join(shown.split())
    assert facts["memory"][0]["kept_fp32"] > 0 and [r["precision"] for r in facts["memory"]] == ["fp16-master"]

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]]), "labels": torch.tensor([1])}
    MasterWeights(model, torch.optim.AdamW(model.parameters()), "fp16", keep_fp32=training["keep_fp32"])
    assert torch.isfinite(model(**batch).loss)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    MasterWeights(model, torch.optim.AdamW(model.parameters()), "fp16")
    assert not torch.isfinite(model(**batch).loss)


def test_eager_llama_without_a_tokenizer_is_told_to_use_sdpa(tmp_path, capsys):
    tiny_models.tiny("llama").save_pretrained(tmp_path / "llama")
    out = tmp_path / "facts.json"
    options = ["--samples", 2, "--max-length", 8, "--precision", "fp16-master", "--json", out]
    assert run(tmp_path / "llama", "--attn", "eager", *options) == 0
    facts = json.loads(out.read_text())
    assert facts["task"] == "causal-lm" and facts["inputs"]["source"] == "made up at random"
    assert not facts["export"]["before"]["finite"] and facts["export"]["sdpa"] == {"keep": [], "casts": 0}
    assert "model.attn: sdpa" in " ".join(capsys.readouterr().out.split())
    assert run(tmp_path / "llama", *options) == 0
    assert json.loads(out.read_text())["export"]["keep"] == []


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_pictures_and_sounds_are_made_up(family, tmp_path, monkeypatch, capsys):
    tiny_models.tiny(family).save_pretrained(tmp_path / family)
    out = tmp_path / "facts.json"
    assert run(tmp_path / family, "--samples", 2, "--precision", "bf16-split", "--json", out) == 0
    facts = json.loads(out.read_text())
    assert (
        facts["export"] is None and list(facts["training"]) == ["bf16"] and facts["training"]["bf16"]["after"]["right"]
    )
    assert {row["compute"] for row in facts["speed"]["rows"]} == {"bf16"}
    assert all(row["fp32_ms"] > 0 and row["half_ms"] > 0 for row in facts["speed"]["rows"])


def test_a_recipe_gives_the_data(overflowing, tmp_path):
    folder, _ = overflowing
    path = tiny.write(tiny.jpqd(tmp_path), tmp_path / "recipe.yaml")
    out = tmp_path / "facts.json"
    assert run(folder, "--data", path, "--samples", 10, "--precision", "fp32", "--json", out) == 0
    facts = json.loads(out.read_text())
    assert facts["inputs"]["examples"] == 10 and "recipe.yaml" in facts["inputs"]["source"]
    assert facts["export"] is None and facts["training"] == {} and facts["speed"]["rows"] == []


def test_a_pruned_and_quantized_model_of_a_run(tmp_path, capsys):
    model = tiny_models.tiny("bert")
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1]}, {0: [], 1: list(range(0, 48, 2))}))
    pruned = sum(p.numel() for p in model.parameters())
    mptrain.save(quantizers.quantize(model, Ptq(mode="ptq"), [tiny_models.inputs("bert")]), tmp_path / "model")
    out = tmp_path / "facts.json"
    options = ["--samples", 2, "--max-length", 8, "--precision", "fp16-master", "--json", out]
    assert run(tmp_path / "model", *options) == 0
    facts = json.loads(out.read_text())
    assert facts["parameters"] == pruned and facts["memory"][0]["parameters"] == pruned
    assert facts["training"]["fp16"]["after"]["right"] and facts["export"]["after"]["right"]
    assert facts["structure"]["dropped"] == ["bert.encoder.layer.0.ffn"]
    assert "Left out whole by an earlier pruning: bert.encoder.layer.0.ffn" in " ".join(capsys.readouterr().out.split())


def test_what_can_be_cut_and_what_stays_whole(tmp_path, capsys):
    tiny_models.tiny("llama").save_pretrained(tmp_path / "llama")
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    out, options = tmp_path / "facts.json", ["--samples", 2, "--max-length", 8, "--precision", "fp32"]
    assert run(tmp_path / "llama", *options, "--json", out) == 0
    found = json.loads(out.read_text())["structure"]
    assert [(b["name"], b["kind"], b["units"]) for b in found["blocks"][:2]] == [
        ("model.layers.0.self_attn", "heads", 2), ("model.layers.0.mlp", "ffn", 48)
    ]  # fmt: skip
    sink = {"parameter": "model.layers.0.self_attn.o_proj.weight", "dim": 1, "role": "sink", "per_unit": 16}
    assert sink in found["blocks"][0]["axes"]
    text = capsys.readouterr().out
    assert "What can be cut" in text and "model.layers.{0-1}.mlp" in text and "intermediate_size" in text
    assert "What stays whole" not in text
    assert run(tmp_path / "bloom", *options) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What stays whole" in text and "transformer.h.{0-1}.self_attention" in text and "ALiBi" in text


def test_a_model_of_which_nothing_can_be_cut(tmp_path, capsys):
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    out = tmp_path / "facts.json"
    assert run(tmp_path / "mamba", "--samples", 2, "--max-length", 8, "--precision", "fp32", "--json", out) == 0
    found = json.loads(out.read_text())["structure"]
    assert found["blocks"] == [] and "low rank" in found["error"]
    assert "nothing can be cut out of MambaForCausalLM" in " ".join(capsys.readouterr().out.split())


def test_wrong_input_is_exit_2(overflowing, tmp_path, capsys):
    folder, _ = overflowing
    (tmp_path / "ids.csv").write_text("id\n1\n")
    cases = {
        "--precision must be one of": [folder, "--precision", "fp8"],
        "--task must be one of": [folder, "--task", "translation"],
        "is not a folder": [tmp_path / "nothing"],
        "there is no file": [folder, "--data", tmp_path / "none.csv"],
        "has no column `text`, its columns are 'id'": [folder, "--data", tmp_path / "ids.csv"],
        "--samples must be at least 1": [folder, "--samples", 0],
        "--json: there is no folder": [folder, "--json", tmp_path / "no" / "facts.json"],
    }
    for words, arguments in cases.items():
        assert run(*arguments) == 2, words
        assert words in " ".join(capsys.readouterr().err.split())


def test_tasks_are_guessed_from_the_head():
    tasks = {
        "bert": "text-classification",
        "vit": "image-classification",
        "wav2vec2": "audio-classification",
        "opt": "causal-lm",
    }
    for family, task in tasks.items():
        config = tiny_models.tiny(family).config
        config.architectures = [type(tiny_models.tiny(family)).__name__]
        assert guess_task(config) == task
    # without a head it is the encoder that is meant, not one with a head drawn at random
    for family, bare, task in (
        ("opt", "OPTModel", "embedding"),
        ("bert", "BertModel", "embedding"),
        ("vit", "ViTModel", "image-classification"),
        ("wav2vec2", "Wav2Vec2Model", "audio-classification"),
    ):
        config = tiny_models.tiny(family).config
        config.architectures = [bare]
        assert guess_task(config) == task
