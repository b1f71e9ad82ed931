"""Heads in the exported graph: what they compute, in every format, on the last token of a text, and with a cache."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import transformers as t
from kit import tiny as kit
from kit.long import except_for
from kit.tiny_models import inputs, tiny

from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import weight_only
from mptrain.core.errors import ExportError, UserError
from mptrain.core.signature import probed
from mptrain.data.load import task_class
from mptrain.export.base import Source
from mptrain.export.formats import FORMATS, format_of
from mptrain.export.openvino.runner import CachedIr
from mptrain.export.openvino.write import write
from mptrain.export.torch import heads as after
from mptrain.recipe import EXPORTS, TASKS, Qat, WeightOnly
from mptrain.recipe.exports.heads import Head, keep_score, misfit
from mptrain.verify import parity

SHAPES = {"coreml": {"shapes": {"kind": "ranged", "batch": [1, 8], "length": [1, 40]}}}
TOP = [Head(topk=5), Head(softmax=True)]


def causal(family="llama", **config):
    """Weights so large that one token is clearly the likeliest."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.3}
    gpt = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.3}
    made = {"llama": lambda: t.LlamaConfig(**size, **config), "gpt2": lambda: t.GPT2Config(**gpt, **config)}
    return t.AutoModelForCausalLM.from_config(made[family]()).eval()


def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = t.BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)
    return t.BertModel(config, add_pooling_layer=False).eval()


def texts(rows=4, length=9, seed=0):
    """One padded on the right, one on the left."""
    ids = torch.randint(4, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def signed(model, batch, heads, task):
    return after.signature_with(probed(model, batch), heads, TASKS[task])


@torch.no_grad()
def run(model, batch, heads, task):
    return signed(model, batch, heads, task).run(model, batch)


# -- what they compute


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_has_them_on_the_last_token_that_counts(family):
    model, batch = causal(family), texts()
    with torch.no_grad():
        logits = model(**batch).logits
    last = torch.stack([logits[0, 5], *logits[1:, 8]])
    for heads, expected in (
        ([Head(softmax=True)], {"probabilities": last.softmax(-1)}),
        ([Head(argmax=True)], {"indices": last.argmax(-1)}),
        (TOP, {"values": last.topk(5).values.softmax(-1), "indices": last.topk(5).indices}),
        (TOP[::-1], {"values": last.softmax(-1).topk(5).values, "indices": last.topk(5).indices}),
    ):
        found = run(model, batch, heads, "causal-lm")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(**batch).logits, logits), "the model itself gives what it did"


def test_only_the_last_token_goes_into_the_product_with_the_vocabulary():
    model, sizes = causal(), []
    model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(tuple(out.shape)))
    run(model, texts(), TOP, "causal-lm")
    assert sizes[-1] == (4, 1, 50)


def test_vectors_are_means_or_first_tokens_of_what_counts():
    model, batch = encoder(), texts()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mean = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(hidden, batch["attention_mask"])])
    first = torch.stack([hidden[0, 0], hidden[1, 3], hidden[2, 0], hidden[3, 0]])
    for how, expected in (("mean", mean), ("cls", first)):
        found = run(model, batch, [Head(pool=how)], "embedding")
        torch.testing.assert_close(found["sentence_embedding"], expected)
        found = run(model, batch, [Head(pool=how), Head(normalize=True)], "embedding")["sentence_embedding"]
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_scores_are_read_from_outputs_that_keep_them():
    model, batch = tiny("bert"), inputs("bert")
    with torch.no_grad():
        logits = model(**batch).logits
    found = after.restored(run(model, batch, [Head(softmax=True)], "text-classification"), batch)
    np.testing.assert_allclose(found["logits"], logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
    model, batch = encoder(), texts()
    found = after.restored(run(model, batch, [Head(pool="mean")], "embedding"), batch)
    assert found["last_hidden_state"].shape == (4, 9, 32)
    assert keep_score([Head(softmax=True)], TASKS["text-classification"])
    assert not keep_score([Head(softmax=True)], TASKS["causal-lm"])
    assert not keep_score([Head(argmax=True)], TASKS["text-classification"])


def test_agreement_is_of_what_was_chosen():
    alike = after.agreement(task_class(TASKS["causal-lm"]), TOP)
    indices = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    other = np.array([[5, 4, 3, 2, 1], [6, 7, 8, 40, 41]])
    found = alike({"values": indices, "indices": indices}, {"values": indices, "indices": other}, texts(2))
    np.testing.assert_allclose(found, [1, 0.6])


@pytest.mark.parametrize("task", [name for name, kind in TASKS.items() if kind.gives is None])
def test_a_task_of_other_outputs_has_none(task):
    assert "its models can have none" in misfit([Head(softmax=True)], TASKS[task])


def test_more_than_there_is_to_choose_from_is_refused():
    with pytest.raises(UserError, match="topk 4 of 3 classes; give at most 3"):
        signed(tiny("bert"), inputs("bert"), [Head(topk=4)], "text-classification")
    with pytest.raises(UserError, match="topk 51 of the 50 tokens"):
        after.check_vocabulary([Head(topk=51)], causal().config)


# -- exported


CASES = {
    "tokens": (causal, texts, TOP, "causal-lm"),
    "classes": (lambda: tiny("bert"), lambda **how: inputs("bert", **how), [Head(argmax=True)], "text-classification"),
    "vector": (encoder, texts, [Head(pool="mean"), Head(normalize=True)], "embedding"),
    "first": (encoder, texts, [Head(pool="cls")], "embedding"),
}


QUICK = [("openvino", case) for case in CASES] + [
    ("onnx", "tokens"),
    ("coreml", "vector"),
    ("coreai", "first"),
]


@pytest.mark.parametrize(("name", "case"), except_for([(n, c) for c in CASES for n in FORMATS], QUICK))
def test_every_format_computes_them(name, case):
    make, batches, heads, task = CASES[case]
    model, batch = make(), batches()
    listed = [head.model_dump(exclude_none=True) for head in heads]
    spec = EXPORTS[name].model_validate(
        {"id": "x", "format": name, "of": ["model"], "heads": listed, **SHAPES.get(name, {})}
    )
    signature = signed(model, batch, spec.heads, task)
    source = Source(lambda: model, signature, batch, "fp32", "fp32", False, lambda: [batch])
    kind = format_of(spec)
    with TemporaryDirectory() as folder:
        found = kind.write(source, Path(folder))
        with closing(kind.open(found.path, replace(source, written=found.facts))) as runner:
            others = [batches(seed=3), {n: v[:1, :5] for n, v in batch.items()}]
            alike = after.agreement(task_class(TASKS[task]), heads)
            compared = parity.compare(model, runner, others, signature=signature, agreement=alike)
            assert set(runner(batch)) == set(signature.output_names)
            facts = runner.facts()
            if "fused_attention" in spec.checks:
                assert facts.fused_attention == facts.attention_layers == 2, "a head's softmax is no attention"
    assert compared["max_abs_diff"] < 2e-5 and compared["agreement"] > 0.999


def test_wrong_choices_of_an_exact_export_are_an_error():
    model, batch = causal(), texts()
    signature = signed(model, batch, TOP, "causal-lm")

    def shifted(given):
        found = {name: value.numpy() for name, value in signature.run(model, given).items()}
        return found | {"indices": found["indices"] + 1}

    with pytest.raises(ExportError, match="output indices: the exported model gives what the model does in"):
        parity.compare(model, shifted, [batch], signature=signature)


@pytest.mark.parametrize(
    ("family", "precision", "change"),
    [
        ("gpt2", "fp32", lambda model: model),
        ("llama", "fp32", lambda model: model),
        ("llama", "fp16", lambda model: model),
        ("llama", "int8", lambda model: quantizers.quantize(model, Qat(mode="qat"), [texts(seed=s) for s in range(2)])),
        (
            "gpt2",
            "compressed",
            lambda model: (
                weight_only.compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16), []) and model
            ),
        ),
    ],
)
def test_a_cache_is_kept_with_them(family, precision, change, tmp_path):
    """Greedily, the first index of each call is what generate chooses."""
    model = causal(family)
    model = change(model) or model
    done = write(model, texts(), tmp_path, precision=precision, cache=40, calibration=[texts()],
                 signature=signed(model, texts(), TOP, "causal-lm"))  # fmt: skip
    batch, new = {name: value[2:] for name, value in texts().items()}, 8
    with torch.no_grad():
        ids = batch["input_ids"]
        for _ in range(new):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    with closing(CachedIr(done.xml, 40)) as runner:
        assert runner.outputs == ["values", "indices"]
        found, mask = batch["input_ids"], batch["attention_mask"]
        call = batch
        for _ in range(new):
            token = torch.as_tensor(runner.step(call)["indices"][:, :1])
            found, mask = torch.cat([found, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            call = {"input_ids": token, "attention_mask": mask}
        assert runner.facts().weight_types
    assert float((found == ids).float().mean()) == 1.0 if precision != "int8" else found.shape == ids.shape


# -- as a user asks for them


def test_the_command_line_writes_them_and_says_how_to_load_them(tmp_path, capsys):
    kit.save_bert(tmp_path / "bert")
    (tmp_path / "texts.txt").write_text("good film\nbad plot was not so good\n" * 8)
    words = ["export", str(tmp_path / "bert"), "--to", str(tmp_path / "ov"), "--data", str(tmp_path / "texts.txt")]
    status = main([*words, "--head", "softmax", "--head", "topk=2", "--json", str(tmp_path / "facts.json")])
    assert status == 0, capsys.readouterr().err
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["runtime"]["heads"] == ["softmax", "topk 2"] and facts["passed"]
    card = (tmp_path / "ov" / "README.md").read_text()
    assert "openvino.compile_model" in card and "OVModel" not in card
    for given, said in (
        ("topk=3", "topk 3 of 2 classes"),
        ("pool=mean", "pool is no head for task text-classification"),
    ):
        assert main([*words[:3], str(tmp_path / "no"), *words[4:], "--head", given]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
