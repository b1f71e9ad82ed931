"""Compressed weights in an IR: the integers and scales of the torch model, executed; from a recipe to a report."""

import json
from collections import Counter

import numpy as np
import openvino as ov
import pytest
import torch
from kit import tiny_tasks
from kit.records import palettized
from kit.tiny_models import inputs, logits, tiny

import mptrain
from mptrain.compress.weights import records, weight_only
from mptrain.core.errors import ExportError, RecipeError, UserError
from mptrain.export.openvino import facts, weights
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.recipe import WeightOnly, file
from mptrain.run import run

CASES = {
    "i4 blocks": ({"block_size": 16}, "i4"),
    "u4 blocks": ({"block_size": 8, "symmetric": False}, "u4"),
    "i4 tensor": ({"granularity": "tensor"}, "i4"),
    "u8 channel": ({"granularity": "channel", "bits": 8, "symmetric": False}, "u8"),
    "i8 blocks": ({"block_size": 16, "bits": 8}, "i8"),
}


def compressed(family, **options):
    model = tiny(family)
    weight_only.compress(model, WeightOnly(mode="weight_only", method="rtn", **options))
    return model


def integers(node):
    """The values of a constant, 4-bit ones unpacked by OpenVINO itself."""
    if node.get_element_type().get_type_name() in ("i4", "u4"):
        convert = ov.opset13.convert(node, "i32")
        return next(iter(ov.Core().compile_model(ov.Model([convert], []), "CPU")([]).values()))
    return node.data


def applied(stored):
    """{"Subtract": zero point, "Multiply": scale}, the constants, of the constant of a weight."""
    found, node = {}, reader(reader(stored))
    while node.get_type_name() in ("Subtract", "Multiply"):
        constant = node.input_value(1).get_node()
        while constant.get_type_name() == "Convert":
            constant = constant.input_value(0).get_node()
        found[node.get_type_name()] = constant
        node = reader(node)
    return found


def reader(node):
    return next(iter(node.output(0).get_target_inputs())).get_node()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_the_ir_holds_the_records(family, case, tmp_path):
    options, kind = CASES[case]
    model = compressed(family, **options)
    found = records.distinct(records.of(model))
    exported = export_openvino(model, inputs(family), tmp_path / "m", precision="compressed")
    read = ov.Core().read_model(exported.xml)
    constants = {n.get_friendly_name(): n for n in read.get_ops() if n.get_type_name() == "Constant"}
    for name, record in found.items():
        stored = constants[f"self.model.{name}"]
        assert stored.get_element_type().get_type_name() == ("i8" if "embed" in name else kind)
        assert np.array_equal(integers(stored).reshape(record.shape), record.q.numpy())
        beside = applied(stored)
        scale = beside["Multiply"]
        assert scale.get_element_type() == ov.Type.f16
        assert np.array_equal(scale.data.reshape(record.scale.shape).astype(np.float32), record.scale.numpy())
        if record.zero is not None:
            zero = integers(beside["Subtract"])
            assert np.array_equal(zero.reshape(record.zero.shape), record.zero.numpy())
    expected = Counter({"i8": 0, kind: 0})
    for name, record in found.items():
        zeros = 0 if record.zero is None else record.zero.numel()
        expected["i8" if "embed" in name else kind] += (record.q.numel() + zeros) * record.bits / 8
    types = facts.stored_types(read)
    assert all(types[k] == pytest.approx(v, abs=len(found)) for k, v in expected.items() if v)
    difference = np.abs(
        CompiledIr(exported.xml)(inputs(family))["logits"] - logits(model, inputs(family)).numpy()
    ).max()
    assert difference < 2e-6


def test_tables_are_expanded(tmp_path):
    model = tiny("bert")
    table = palettized(3, 32, per_group=3)
    records.attach(model, {"classifier.weight": table})
    exported = export_openvino(model, inputs("bert"), tmp_path / "m", precision="fp32")
    assert set(facts.stored_types(ov.Core().read_model(exported.xml))) == {"f32"}
    torch.testing.assert_close(
        torch.from_numpy(CompiledIr(exported.xml)(inputs("bert"))["logits"]), logits(model, inputs("bert"))
    )


def test_precision_and_model_must_fit(tmp_path):
    for model, precision in [(tiny("bert"), "compressed"), (compressed("bert", block_size=16), "fp32")]:
        with pytest.raises(UserError, match="compressed"):
            export_openvino(model, inputs("bert"), tmp_path / "m", precision=precision)


def test_a_graph_without_the_weight_is_an_error():
    model = compressed("bert", block_size=16)
    graph_ = ov.Model([ov.opset13.constant(np.zeros(3, np.float32))], [])
    with pytest.raises(ExportError, match=r"no constant that holds them"):
        weights.store(graph_, records.of(model))


# -- from a recipe


def recipe(folder, **quantize):
    made = tiny_tasks.recipe("causal-lm", folder)
    made["data"]["stride"] = 8
    made["stages"] = [
        {"id": "dense", "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}},
        {"id": "int4", "quantize": {"mode": "weight_only", "block_size": 16, **quantize}},
    ]
    made["export"] = [{"id": "ov", "format": "openvino", "of": ["dense", "int4"]}]
    made["gates"] = {"parity": 1e-4}
    return made


def read(made, folder):
    (folder / "recipe.yaml").write_text(json.dumps(made))
    return file.read(folder / "recipe.yaml")


def test_a_recipe_from_training_to_report(tmp_path):
    report = run(read(recipe(tmp_path), tmp_path).recipe)
    baseline, int4 = report["variants"]
    assert (baseline["id"], int4["id"], int4["precision"]) == ("baseline_fp32", "int4_compressed", "compressed")
    assert int4["size_bytes"] < baseline["size_bytes"]
    assert {"i4", "i8", "f16"} <= set(int4["runtime"]["weight_types"])
    assert int4["parity"]["max_abs_diff"] < 1e-4
    assert list(int4["metrics"]) == ["loss", "perplexity"]
    assert report["data"]["perplexity"]["stride"] == 8
    words = (tmp_path / "run/README.md").read_text()
    assert "int4 weights (gptq, per block of 16)" in words
    loaded = mptrain.load(next((tmp_path / "run/stages/int4").iterdir()) / "model")
    assert {r.bits for r in records.of(loaded).values()} == {4, 8}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metod": "rtn"}, "metod.*method"),
        ({"bits": 3}, "bits"),
        ({"overrides": {"fc1": {"bit": 8}}}, "bit.*bits"),
    ],
)
def test_recipes_with_mistakes(tmp_path, change, problem):
    with pytest.raises(RecipeError, match=f"(?s){problem}"):
        read(recipe(tmp_path, **change), tmp_path)


def test_nothing_starts_from_compressed_weights(tmp_path):
    made = recipe(tmp_path)
    made["stages"].append({"id": "more", "train": {"epochs": 1, "lr": 1e-3}})
    with pytest.raises(RecipeError, match=r"from: 'int4' holds compressed weights"):
        read(made, tmp_path)
