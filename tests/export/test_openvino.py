import json
import os
from contextlib import closing

import numpy as np
import openvino as ov
import pytest
import torch
import transformers as t
from kit.structures import keep
from kit.tiny import tokenizer
from kit.tiny_models import inputs, tiny
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.integers import records_from_quantizers
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import ExportError, UserError
from mptrain.core.hooks import HOOKS
from mptrain.export.openvino import runner
from mptrain.export.openvino.facts import stored_types
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.stream import IrStream
from mptrain.export.openvino.write import export_openvino
from mptrain.export.torch.traceable import additive_mask
from mptrain.recipe import OpenVino, Qat
from mptrain.recipe.exports.base import Use


def quantized(model, family, **options):
    """Of a range with which CPUs with and without VNNI compute the same."""
    config = Qat(mode="qat", reduce_range=True, **options)
    return quantizers.quantize(model, config, [inputs(family, seed=i) for i in range(2)])


def export(model, family, folder, precision="fp32", **options):
    return export_openvino(model, inputs(family, batch=2), folder / precision, precision=precision, **options)


def outputs(model, batch):
    with torch.no_grad():
        return {name: v.numpy() for name, v in model(**batch).items() if isinstance(v, torch.Tensor)}


def longer(family, batch, seed):
    """Inputs of another batch size and length than the traced ones."""
    found = inputs(family, batch=batch, seed=seed)
    if family == "wav2vec2":
        return {"input_values": torch.randn(batch, 777)}
    if "input_ids" in found:
        found = {name: torch.cat([value] * 2, 1)[:, :13] for name, value in found.items()}
        found["attention_mask"] = found["attention_mask"].cummin(1)[0]  # padding stays on the right
    return found


def differ(model, runner, batch):
    theirs, ours = runner(batch), outputs(model, batch)
    assert theirs.keys() <= ours.keys() and theirs
    return max(np.abs(theirs[name] - ours[name]).max() for name in theirs)


# -- graphs


TASKS = {
    "BertForSequenceClassification": ("bert", "OVModelForSequenceClassification"),
    "DistilBertForSequenceClassification": ("distilbert", "OVModelForSequenceClassification"),
    "RobertaForTokenClassification": ("roberta", "OVModelForTokenClassification"),
    "BertForQuestionAnswering": ("bert", "OVModelForQuestionAnswering"),
    "ViTForImageClassification": ("vit", "OVModelForImageClassification"),
    "SwinForImageClassification": ("swin", "OVModelForImageClassification"),
    "Wav2Vec2ForSequenceClassification": ("wav2vec2", "OVModelForAudioClassification"),
    "OPTForCausalLM": ("opt", "OVModelForCausalLM"),
    "LlamaForCausalLM": ("llama", "OVModelForCausalLM"),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_at_every_shape_and_loads_in_optimum(name, tmp_path):
    import optimum.intel

    family, loader = TASKS[name]
    model = tiny(family, cls=getattr(t, name), num_labels=2 if "Question" in name else 3)
    model.config.mptrain_structure = {"version": 1}
    model.config.auto_map = {"AutoModel": "modeling.Class"}
    done = export(model, family, tmp_path)
    runner = CompiledIr(done.xml, threads=1)
    expected = ["start_logits", "end_logits"] if "Question" in name else ["logits"]
    assert runner.inputs == list(inputs(family)) and runner.outputs == expected
    for batch in (inputs(family), longer(family, 1, 1), longer(family, 5, 2)):
        assert differ(model, runner, batch) < 1e-5
    files = sum(os.path.getsize(done.folder / f"openvino_model.{kind}") for kind in ("xml", "bin"))
    assert done.size_bytes == files

    config = json.loads((done.folder / "config.json").read_text())
    assert config["model_type"] == model.config.model_type and "auto_map" not in config
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}  # else bf16 on CPUs that have it
    if "CausalLM" in loader:
        options["use_cache"] = False
    loaded = getattr(optimum.intel, loader).from_pretrained(done.folder, **options)
    theirs, ours = loaded(**inputs(family, seed=3)), outputs(model, inputs(family, seed=3))
    for output in expected:
        assert np.abs(theirs[output].numpy() - ours[output]).max() < 1e-4
    if "CausalLM" not in loader:
        assert loaded.config.id2label == model.config.id2label


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eager_attention_is_exported_too(family, tmp_path):
    model = tiny(family, attn="eager")
    assert differ(model, CompiledIr(export(model, family, tmp_path).xml), longer(family, 3, 1)) < 1e-5


def test_left_padding_of_a_causal_model(tmp_path):
    model, batch = tiny("llama"), inputs("llama")
    runner = CompiledIr(export(model, "llama", tmp_path).xml)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    seen = batch["attention_mask"].bool().numpy()
    assert np.abs(runner(batch)["logits"] - outputs(model, batch)["logits"])[seen].max() < 1e-5


def test_a_bfloat16_model_is_exported_in_fp32(tmp_path):
    model = tiny("bert").bfloat16()
    done = export(model, "bert", tmp_path)
    assert differ(tiny("bert").bfloat16().float(), CompiledIr(done.xml), inputs("bert")) < 1e-5
    assert model.dtype == torch.bfloat16


def test_a_shrunk_model(tmp_path):
    model = tiny("bert")
    structure = find_structure(model)
    shrink(model, structure, keep(structure, {0: [1, 2]}, {0: list(range(16))}))
    done = export(model, "bert", tmp_path)
    assert differ(model, CompiledIr(done.xml), longer("bert", 2, 1)) < 1e-5


@pytest.mark.parametrize("family", ["distilbert", "vit", "wav2vec2", "llama"])
def test_int8_weights_are_stored_as_int8(family, tmp_path):
    model = tiny(family)
    q = quantized(model, family)
    done = export(q, family, tmp_path, "int8")
    graph = ov.Core().read_model(done.xml)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    integers = sum(m.weight.numel() for m in linears.values())
    assert stored_types(graph)["i8"] >= integers
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert stored_types(graph)["f32"] >= 4 * sum(table.numel() for table in tables)
    expected, batch = outputs(q, inputs(family))["logits"], inputs(family)
    # One value that another order of summation rounds to the next level moves a logit by a few levels' worth.
    error = np.abs(CompiledIr(done.xml)(batch)["logits"] - expected)
    assert error.mean() < 0.01 * np.abs(expected).max()


def test_int8_and_int4_embeddings(tmp_path):
    model = tiny("bert", hidden_size=64)
    q = quantized(model, "bert")
    sizes = {}
    for precision in ("int8", "int8_emb4"):
        done = export(q, "bert", tmp_path, precision, embeddings="int8")
        sizes[precision] = stored_types(ov.Core().read_model(done.xml))
        rows, batch = model.bert.embeddings.word_embeddings.weight, inputs("bert")
        expected = outputs(q, batch)["logits"]
        error = np.abs(CompiledIr(done.xml)(batch)["logits"] - expected).max()
        assert error < (0.05 if precision == "int8" else 0.3) * np.abs(expected).max()
    other = sum(e.numel() for n, e in model.bert.embeddings.named_parameters() if "position" in n or "token_type" in n)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert sizes["int8"]["i8"] == linears + other + rows.numel() and "i4" not in sizes["int8"]
    assert sizes["int8_emb4"]["i8"] == linears + other
    assert sizes["int8_emb4"]["i4"] == rows.numel() / 2
    assert sizes["int8"]["f32"] < 0.1 * 4 * linears  # biases, scales, LayerNorm


def test_the_tables_of_an_int8_file_are_those_of_the_model(tmp_path):
    """To the bit: a row that is rounded otherwise makes every 8-bit activation behind it round anew."""
    q = quantized(tiny("bert"), "bert")
    done = export(q, "bert", tmp_path, "int8", embeddings="int8")
    found = {}
    for node in ov.Core().read_model(done.xml).get_ops():
        if node.get_type_name() == "Gather" and "embeddings" in node.get_friendly_name():
            times = node.input(0).get_source_output().get_node()
            integers, scale = (times.input(i).get_source_output().get_node() for i in range(2))
            data = [n.input(0).get_source_output().get_node().data.astype(np.float32) for n in (integers, scale)]
            found[node.get_friendly_name().split("/")[0].removeprefix("__module.")] = data[0] * data[1]
    assert len(found) == 3
    for name, table in found.items():
        with torch.no_grad():
            read = looked_up(q, name)
        np.testing.assert_array_equal(table[read[0]], read[1])


@pytest.mark.parametrize("bits", [{}, {"encoder.layer.0": 4}])
def test_the_integers_of_an_int8_file_are_those_of_the_model(bits, tmp_path):
    """Also of weights as near to the middle between two levels as float32 goes, which w / s and w · (1 / s) round
    differently."""
    q = quantized(tiny("bert"), "bert", bits=bits)
    weights = [m for m in q.modules() if isinstance(m, FakeQuantizer) and m.weight_of is not None]
    apart = 0
    for quantizer in weights:
        weight, step = q.get_parameter(f"{quantizer.weight_of}.weight").data, quantizer.grid()[0].detach()
        low, high = quantizer.levels
        middle = (torch.arange(weight[0].numel()) % (high - low) + low + 0.5) * step
        weight.copy_(middle.reshape(weight.shape))
        apart += int(((weight / step).round() != (weight * (1 / step)).round()).sum())
    assert apart > 50
    done = export(q, "bert", tmp_path, "int8")
    expected, found = records_from_quantizers(q), 0
    for node in ov.Core().read_model(done.xml).get_ops():
        name = node.get_friendly_name().split("/")[0].removeprefix("__module.") + ".weight"
        if node.get_type_name() != "MatMul" or name not in expected:
            continue
        source = node.input(1).get_source_output().get_node()
        while source.get_type_name() != "Constant":
            source = source.input(0).get_source_output().get_node()
        stored = source.data if source.get_element_type() == ov.Type.i8 else unpacked(source)
        np.testing.assert_array_equal(stored.reshape(expected[name].q.shape), expected[name].q.numpy(), err_msg=name)
        found += 1
    assert found == len(weights)


def unpacked(constant):
    """The integers of an i4 constant."""
    data = constant.data.view(np.uint8).ravel()
    halves = np.stack([data & 15, data >> 4], axis=-1).ravel().astype(np.int8)
    return np.where(halves > 7, halves - 16, halves)


def looked_up(model, name):
    """What a table is asked, and what goes on from it in the model."""
    (place,) = [e["at"] for e in quantizers.config_of(model)["modules"] if e["kind"] == "rows" and e["table"] == name]
    found = []
    asked = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].numpy()))
    given = model.get_submodule(HOOKS).get_submodule(place[0])
    given = given.register_forward_hook(lambda *call: found.append(call[2].numpy()))
    model(**inputs("bert"))
    asked.remove(), given.remove()
    return found


def test_ignored_layers_stay_fp32_when_embeddings_are_compressed(tmp_path):
    model = tiny("bert")
    q = quantized(model, "bert", ignore=["encoder.layer.1"])
    done = export(q, "bert", tmp_path, "int8", embeddings="int8")
    ignored = sum(m.weight.numel() for m in model.bert.encoder.layer[1].modules() if isinstance(m, torch.nn.Linear))
    assert stored_types(ov.Core().read_model(done.xml))["f32"] >= 4 * ignored


def test_four_bit_layers_are_stored_as_int4(tmp_path):
    model = tiny("bert")
    q = quantized(model, "bert", bits={"encoder.layer.0": 4})
    done = export(q, "bert", tmp_path, "int8")
    four = sum(m.weight.numel() for m in model.bert.encoder.layer[0].modules() if isinstance(m, torch.nn.Linear))
    assert stored_types(ov.Core().read_model(done.xml))["i4"] == four / 2
    batch = inputs("bert")
    expected = outputs(q, batch)["logits"]
    assert np.abs(CompiledIr(done.xml)(batch)["logits"] - expected).mean() < 0.02 * np.abs(expected).max()


def test_smooth_quant_and_asymmetric_weights(tmp_path):
    q = quantized(tiny("bert"), "bert", smooth_quant=True, weights="asymmetric", activations="asymmetric")
    done = export(q, "bert", tmp_path, "int8")
    linears = sum(m.weight.numel() for m in q.modules() if isinstance(m, torch.nn.Linear))
    assert stored_types(ov.Core().read_model(done.xml))["i8"] >= linears
    expected = outputs(q, inputs("bert"))["logits"]
    error = np.abs(CompiledIr(done.xml)(inputs("bert"))["logits"] - expected)
    assert error.mean() < 0.01 * np.abs(expected).max()


# -- the folder


def test_a_pipeline_runs_from_the_folder(tmp_path):
    from optimum.intel import OVModelForSequenceClassification

    names = tokenizer()
    model = tiny("bert", id2label={0: "bad", 1: "fine", 2: "good"}, label2id={"bad": 0, "fine": 1, "good": 2})
    example = names(["a good film", "was not so good"], padding=True, return_tensors="pt")
    done = export_openvino(model, example, tmp_path / "ir", precision="fp32", processor=names)
    assert {p.name for p in done.folder.iterdir()} >= {"openvino_model.xml", "openvino_model.bin", "tokenizer.json"}
    pipe = t.pipeline(
        "text-classification",
        OVModelForSequenceClassification.from_pretrained(done.folder),
        tokenizer=str(done.folder),
    )
    expected = outputs(model, dict(names("a poor plot", return_tensors="pt")))["logits"].argmax()
    assert pipe("a poor plot")[0]["label"] == ["bad", "fine", "good"][expected]
    assert CompiledIr(done.xml).inputs == ["input_ids", "token_type_ids", "attention_mask"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = tiny("bert")
    first = export(model, "bert", tmp_path)
    kept = first.xml.read_bytes()

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(ov, "save_model", full_disk)
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(OSError, match="No space left"):
            export(model, "bert", folder)
    assert first.xml.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["fp32", "other"] or not list((tmp_path / "other").iterdir())
    monkeypatch.undo()
    assert export(model, "bert", tmp_path).xml.is_file()
    assert not [p for p in tmp_path.rglob(".*") if p.is_dir()]


# -- what stays as it was, and errors


@pytest.mark.parametrize("fails", [False, True])
def test_export_changes_neither_the_model_nor_transformers(fails, tmp_path, monkeypatch):
    model = tiny("llama").train()
    model.config.use_cache = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        monkeypatch.setattr(ov, "convert_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ExportError, match="could not convert LlamaForCausalLM: division by zero"):
            export(model, "llama", tmp_path)
    else:
        export(model, "llama", tmp_path)
    assert model.training and model.config.use_cache is True
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    assert ALL_MASK_ATTENTION_FUNCTIONS["eager"] is eager_mask


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]])
@pytest.mark.parametrize("causal", [True, False])
def test_the_masks_are_transformers_own(mask, causal):
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    arguments = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 5,
        "mask_function": causal_mask_function if causal else bidirectional_mask_function,
        "attention_mask": None if mask is None else torch.tensor(mask).bool(),
    }
    ours, theirs = additive_mask(**arguments), sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(ours == 0, theirs)
    assert torch.equal(ours < 0, eager_mask(**arguments) < 0)
    assert ours.isfinite().all() and ours.half().isfinite().all()


def test_precision_and_model_must_fit(tmp_path):
    model = tiny("vit")
    with pytest.raises(UserError, match="int8 needs a model with fake quantizers"):
        export(model, "vit", tmp_path, "int8")
    q = quantized(model, "vit")
    with pytest.raises(UserError, match="detach them first"):
        export(q, "vit", tmp_path, "fp32")
    with pytest.raises(UserError, match="int8_emb4: ViTForImageClassification has no token embedding"):
        export(q, "vit", tmp_path, "int8_emb4")


# -- the runner


def test_a_runner_says_what_the_plugin_would_compute_in_if_it_were_not_told(tmp_path, monkeypatch):
    assert runner.taken({"INFERENCE_PRECISION_HINT": "f32"}) == "f32"
    compiled = CompiledIr(export(tiny("bert"), "bert", tmp_path).xml, threads=1)
    for other, said in (("bf16", "bf16"), ("f32", None)):
        monkeypatch.setattr(runner, "taken", lambda other=other: other)
        assert compiled.facts().left_to_itself == said


def test_the_runner_takes_arrays_and_tensors_and_drops_other_inputs(tmp_path):
    model = tiny("bert")
    runner = CompiledIr(export(model, "bert", tmp_path).xml, threads=1)
    batch = inputs("bert", labels=True)
    first = runner(batch)
    second = runner({name: value.numpy() for name, value in batch.items()})
    assert first.keys() == {"logits"} and np.array_equal(first["logits"], second["logits"])
    other = runner(inputs("bert", seed=9))
    assert not np.array_equal(other["logits"], first["logits"])  # and the first result was not overwritten
    assert np.array_equal(first["logits"], second["logits"])
    assert runner.precision == "f32"
    assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with pytest.raises(ExportError, match=r"lacks \['attention_mask'\]"):
        runner({"input_ids": batch["input_ids"]})


def test_the_lines_that_load_a_causal_lm_work(tmp_path):
    """optimum-intel looks for a cache in the IR unless it is told otherwise, whatever config.json says."""
    model, batch = tiny("llama"), inputs("llama")
    export_openvino(model, batch, tmp_path / "out", precision="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is False
    folder = str(tmp_path / "out")
    use = Use(f"{folder}/openvino_model.xml", folder, None, "AutoTokenizer", "OVModelForCausalLM", "'text'")
    lines = [line for line in OpenVino.loading(use) if line.startswith(("from optimum", "model = "))]
    found: dict = {}
    exec("\n".join(lines), found)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    assert (found["model"](**batch).logits - expected)[batch["attention_mask"].bool()].abs().max() < 1e-5
    made = found["model"].generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
    assert made.equal(model.generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False, use_cache=False))


# -- several requests in flight


def test_a_stream_computes_every_call(tmp_path):
    model = tiny("bert")
    done = export(model, "bert", tmp_path)
    with closing(IrStream(done.xml, threads=1)) as stream:
        assert stream.requests >= 1
        batch = {name: value.numpy() for name, value in inputs("bert").items()}
        begun, start = [], type(stream._flights[0]).start_async
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(stream._flights[0]), "start_async", lambda r, *a, **k: begun.append(r) or start(r, *a, **k)
            )
            stream(batch, calls=5)
        found = [flight.get_output_tensor(0).data.copy() for flight in stream._flights[:5]]
    expected = outputs(model, inputs("bert"))["logits"]
    assert len(begun) == 5 and all(np.abs(one - expected).max() < 2e-5 for one in found)
