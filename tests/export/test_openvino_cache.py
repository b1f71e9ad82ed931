"""OpenVINO IR with a key-value cache: token by token as torch, in our runner and in optimum-intel."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from contextlib import closing

import numpy as np
import openvino as ov
import pytest
import torch
import transformers as t
from kit import tiny_tasks
from kit.decoders import BATCH, FAMILIES, GREEDY, HYBRID, IDS, LONGEST, MASK, OTHERS, SHARED, check_continues, made
from kit.tiny_models import inputs, tiny

import mptrain
from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import weight_only
from mptrain.core.errors import ExportError, UserError
from mptrain.export.openvino.runner import CachedIr, CompiledIr
from mptrain.export.openvino.write import XML, export_openvino, write
from mptrain.export.torch.token_by_token import check
from mptrain.recipe import OpenVino, Qat, WeightOnly, file
from mptrain.recipe.exports.base import Use
from mptrain.run import run


def as_torch(model, folder):
    done = write(model, BATCH, folder, precision="fp32", cache=LONGEST)
    with closing(CachedIr(done.xml, LONGEST)) as runner:
        check_continues(runner, model)
        return runner.facts()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_torch(family, tmp_path):
    facts = as_torch(made(FAMILIES[family]()), tmp_path)
    assert facts.fused_attention == facts.attention_layers == 2


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_greedy_continuations_of_others_are_those_of_torch(family, tmp_path):
    as_torch(made(OTHERS[family]()), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_keeps_its_cache_too(family, tmp_path):
    as_torch(made(FAMILIES[family](), attn_implementation="eager"), tmp_path)


def test_optimum_loads_the_folder_and_generates(tmp_path):
    """Beams reorder the cache. The file asks for a cache in float32: the CPU plugin's own choice is 8 bits. What it
    computes in is for the caller to say, as the report does: bf16 is the plugin's choice on CPUs that have it."""
    from optimum.intel import OVModelForCausalLM

    model = made(FAMILIES["gpt2"]())
    model.config.use_cache = False  # as training leaves it
    export_openvino(model, BATCH, tmp_path / "out", precision="fp32", cache=LONGEST)
    names = ["config.json", "generation_config.json"]
    assert all(json.loads((tmp_path / "out" / name).read_text())["use_cache"] is True for name in names)
    assert model.config.use_cache is False
    loaded = OVModelForCausalLM.from_pretrained(tmp_path / "out", ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    assert loaded.stateful and loaded.use_cache
    for how in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        given = {"attention_mask": MASK, "max_new_tokens": 24, **GREEDY, **how}
        assert loaded.generate(IDS, **given).equal(model.generate(IDS, **given, use_cache=True)), how
    first = loaded(input_ids=IDS[1:, :8])
    step = loaded(IDS[1:, 8:], torch.ones_like(IDS[1:]), past_key_values=first.past_key_values)
    with torch.no_grad():
        assert (step.logits[:, 0] - model(IDS[1:]).logits[:, 8]).abs().max() < 1e-4


def constants(xml):
    """Weights, each as its type, shape and bytes."""
    found = Counter()
    for node in ov.Core().read_model(xml).get_ops():
        kind = node.get_element_type().to_string() if node.get_type_name() == "Constant" else "i64"
        if kind not in ("i64", "i32", "boolean") and node.get_byte_size() >= 64:
            found[kind, tuple(node.shape), node.get_data().tobytes()] += 1
    return found


def rtn(model):
    weight_only.compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16), [])
    return model


def gptq(model):
    weight_only.compress(model, WeightOnly(mode="weight_only", method="gptq", block_size=16, symmetric=False), [BATCH])
    return model


def scaled(model):
    weight_only.compress(model, WeightOnly(mode="weight_only", method="scale", bits=8, block_size=16), [BATCH])
    return model


@pytest.mark.parametrize(
    ("family", "precision", "change", "stored"),
    [
        ("llama", "compressed", rtn, {"i4"}),
        ("gpt2", "compressed", gptq, {"u4"}),
        ("opt", "compressed", scaled, {"i8"}),
        ("opt", "int8", lambda model: quantizers.quantize(model, Qat(mode="qat"), [BATCH]), {"i8"}),
        ("llama", "fp16", lambda model: model, {"f16"}),
    ],
)
def test_weights_are_those_of_the_export_without_a_cache(family, precision, change, stored, tmp_path):
    model = change(tiny(family))
    found = []
    for name, cache in (("plain", None), ("cached", 20)):
        (tmp_path / name).mkdir()
        options = {"embeddings": "int8" if precision == "int8" else "fp32", "calibration": [BATCH]}
        found.append(constants(write(model, BATCH, tmp_path / name, precision=precision, cache=cache, **options).xml))
    plain, kept = found
    assert sum(kind in stored for kind, _, _ in plain.elements()) > 8 and kept == plain
    runners = CompiledIr(tmp_path / "plain" / XML), CachedIr(tmp_path / "cached" / XML, 20)
    before, after = (runner(batch := inputs(family))["logits"] for runner in runners)
    assert np.abs(after - before)[batch["attention_mask"].bool()].max() < 1e-4


def test_two_exports_are_the_same_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tiny("gpt2"), BATCH, tmp_path / name, precision="fp32", cache=20)
    assert (tmp_path / "a" / XML).read_bytes() == (tmp_path / "b" / XML).read_bytes()


def test_a_model_in_bf16_and_training_is_exported_as_the_float32_one(tmp_path):
    model = tiny("llama").bfloat16().train()
    runner = CachedIr(write(model, BATCH, tmp_path, precision="fp32", cache=20).xml, 20)
    assert model.training and model.dtype == torch.bfloat16
    with torch.no_grad():
        expected = copy.deepcopy(model).float().eval()(IDS).logits.numpy()
    assert np.abs(runner(BATCH)["logits"] - expected).max() < 1e-4


class Forgetful(CachedIr):
    def step(self, batch):
        return super().step({name: value for name, value in batch.items() if name != "beam_idx"})


def test_the_check_sees_a_wrong_cache_and_a_wrong_model(tmp_path):
    model = made(FAMILIES["llama"]())
    xml = write(model, BATCH, tmp_path, precision="fp32", cache=20).xml
    check(CachedIr(xml, 20), model, runtime="OpenVINO", exact=True)
    for exact in (True, False):
        with pytest.raises(ExportError, match="LlamaForCausalLM gives other outputs token by token than as a whole"):
            check(Forgetful(xml, 20), model, runtime="OpenVINO", exact=exact)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight.mul_(1.01)
    check(CachedIr(xml, 20), other, runtime="OpenVINO", exact=False)
    with pytest.raises(ExportError, match="token by token than in torch"):
        check(CachedIr(xml, 20), other, runtime="OpenVINO", exact=True)


def test_padding_on_either_side_and_new_texts(tmp_path):
    model = made(FAMILIES["gpt2"]())
    runner = CachedIr(write(model, BATCH, tmp_path, precision="fp32", cache=9).xml, 9)
    mask = MASK.clone()
    mask[1, 7:] = 0
    for _ in range(2):  # a call starts from an empty state
        found = runner({"input_ids": IDS, "attention_mask": mask})["logits"]
        with torch.no_grad():
            for row, (ids, kept) in enumerate(zip(IDS, mask.bool())):
                assert np.abs(found[row][kept] - model(ids[kept][None]).logits[0].numpy()).max() < 1e-4
    assert np.abs(runner({"input_ids": IDS})["logits"][2] - found[2]).max() < 1e-5
    with pytest.raises(UserError, match="a text of 10 tokens does not fit the export's cache of 9: raise `cache`"):
        runner({"input_ids": torch.ones(1, 10, dtype=torch.long)})


def test_what_cannot_have_a_cache_is_refused_by_name(tmp_path, capsys):
    mamba = made(t.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    for model, message in (
        (mamba, "MambaForCausalLM keeps other things than keys and values; export it without"),
        (made(HYBRID), "Qwen3NextForCausalLM does not run with a cache of keys and values .*; export it without"),
        (tiny("bert"), "needs a plain float32 causal LM, got BertForSequenceClassification"),
    ):
        with pytest.raises(UserError, match=message):
            export_openvino(model, BATCH, tmp_path / "out", precision="fp32", cache=20)
    mptrain.save(tiny("llama"), tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--cache", "41", "--samples", "2"]
    assert main(words) == 2 and "--cache 41 must be 1 to 40" in capsys.readouterr().err
    mptrain.save(mamba, tmp_path / "mamba")
    words[1], words[5] = str(tmp_path / "mamba"), "20"
    assert main(words) == 2 and "MambaForCausalLM keeps other things than keys and values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cache", [None, 20])
def test_a_mixture_of_experts_is_refused_in_a_sentence(cache, tmp_path):
    mixtral = made(t.MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2))
    with pytest.raises(ExportError, match=r"no operation for aten::histc, which MixtralForCausalLM.*experts") as error:
        export_openvino(mixtral, BATCH, tmp_path / "out", precision="fp32", cache=cache)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and not (tmp_path / "out").exists()


def test_verify_reads_a_cached_file_as_the_model(tmp_path, capsys):
    mptrain.save(tiny("llama"), tmp_path / "model")
    export_openvino(tiny("llama"), BATCH, tmp_path / "out", precision="fp32", cache=20)
    words = ["verify", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--samples", "4"]
    assert main(words) == 0, capsys.readouterr().err
    assert "is the source model" in " ".join(capsys.readouterr().out.split())


def test_the_lines_that_load_a_cached_export_take_its_cache():
    use = Use("f/m.xml", "f", "text-generation", "AutoTokenizer", "OVModelForCausalLM", '"…"')
    (plain,) = (line for line in OpenVino.loading(use) if line.startswith("model = "))
    (kept,) = (line for line in OpenVino.loading(dataclasses.replace(use, cached=True)) if line.startswith("model = "))
    assert "use_cache=False" in plain and "use_cache" not in kept


@pytest.mark.long
def test_a_recipe_scores_the_cached_export_as_the_plain_one(tmp_path):
    made_ = tiny_tasks.recipe("causal-lm", tmp_path)
    made_["stages"] = [
        {"id": "dense", "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}},
        {"id": "int4", "quantize": {"mode": "weight_only", "block_size": 16}},
    ]
    export = {"format": "openvino", "of": ["dense", "int4"]}
    made_["export"] = [{"id": "ov", **export}, {"id": "kept", **export, "cache": 32}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(made_))
    report = run(file.read(tmp_path / "recipe.yaml").recipe)
    rows = {v["id"]: v for v in report["variants"]}
    for name, row in rows.items():
        if "kept" in name:
            plain = rows[name.replace("_kept", "")]
            assert row["metrics"]["perplexity"]["value"] == pytest.approx(
                plain["metrics"]["perplexity"]["value"], rel=1e-5
            )
            assert row["runtime"]["weight_types"].keys() == plain["runtime"]["weight_types"].keys()
            assert row["parity"]["relative"] < 1e-5 and row["latency_ms"]
            assert (row["runtime"]["cache"], row["runtime"]["cache_precision"]) == (32, "fp32")
    assert sum("kept" in name for name in rows) == len(rows) - len(rows) // 2 > 1
    assert all(gate["passed"] for gate in report["gates"] if gate["name"] in ("parity", "agreement", "fused_attention"))
    said = "keeps a key-value cache of 32 tokens in fp32; texts went in whole, and made-up ones token by token too."
    page = (tmp_path / "run" / "report.md").read_text()
    assert said in page
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("use_cache=False" in card) == ("kept" not in card.partition("folder = ")[2].partition("\n")[0])
