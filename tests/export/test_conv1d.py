"""Transposed records (GPT-2's Conv1D) in every target: the stored integers and tables give the torch model's logits."""

import numpy as np
import openvino as ov
import pytest
from kit.long import except_for
from kit.tiny_models import inputs, logits, tiny

from mptrain.compress.weights import palettize, records, weight_only
from mptrain.core.errors import UserError
from mptrain.export.coreai.convert import export_coreai
from mptrain.export.coreai.runner import Asset
from mptrain.export.coreml.convert import export_coreml
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import Palettize, WeightOnly

BLOCKS = WeightOnly(mode="weight_only", method="rtn", block_size=16)
ZEROS = WeightOnly(mode="weight_only", method="rtn", block_size=8, symmetric=False)
ROWS = WeightOnly(mode="weight_only", method="rtn", bits=8, granularity="channel")
GROUPS = Palettize(method="kmeans", bits=3, group_size=8)
VECTORS = Palettize(method="kmeans", bits=4, cluster_dim=2, granularity="tensor")
SCALED = Palettize(method="kmeans", bits=4, granularity="tensor", per_channel_scale=True)
BOTH = Palettize(method="kmeans", bits=4, cluster_dim=2, granularity="tensor", per_channel_scale=True)
ONE = Palettize(method="kmeans", bits=4, granularity="tensor")


def compressed(config):
    model = tiny("gpt2")
    model.config.use_cache = False
    if isinstance(config, WeightOnly):
        weight_only.compress(model, config)
    else:
        records.attach(model, palettize.palettize(model, config))
    return model


def check(model, found):
    batch = inputs("gpt2", seed=3)
    np.testing.assert_allclose(found(batch)["logits"], logits(model, batch).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("config", "kind"), [(BLOCKS, "i4"), (ZEROS, "u4"), (ROWS, "i8")])
def test_openvino_holds_them(config, kind, tmp_path):
    model = compressed(config)
    exported = export_openvino(model, inputs("gpt2"), tmp_path / "m", precision="compressed", embeddings="int8")
    check(model, CompiledIr(exported.xml))
    graph = ov.Core().read_model(exported.xml)
    constants = {n.get_friendly_name(): n for n in graph.get_ops() if n.get_type_name() == "Constant"}
    transposed = {name: r for name, r in records.distinct(records.of(model)).items() if r.transposed}
    assert len(transposed) == 8
    for name, record in transposed.items():
        stored = constants[f"self.model.{name}"]
        assert stored.get_element_type().get_type_name() == kind
        assert np.prod(stored.get_output_shape(0)) == record.q.numel()


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "target"),
    [
        (ZEROS, "iOS18"),
        pytest.param(ROWS, "iOS16", marks=pytest.mark.long),
        *(pytest.param(config, "iOS18", marks=pytest.mark.long) for config in (GROUPS, VECTORS, SCALED)),
        pytest.param(ONE, "iOS16", marks=pytest.mark.long),
    ],
)
def test_core_ml_holds_them(config, target, tmp_path):
    model = compressed(config)
    exported = export_coreml(model, inputs("gpt2"), tmp_path / "m", target=target, scaled_tables=True)
    assert not exported.floats
    package = Interpreter(exported.package)
    check(model, package)
    assert sum(facts(package.program)["compressed"].values()) >= len(records.distinct(records.of(model)))


@pytest.mark.parametrize("config", except_for([ZEROS, GROUPS, BOTH], [ZEROS]))
def test_core_ai_holds_them(config, tmp_path):
    model = compressed(config)
    exported = export_coreai(model, inputs("gpt2"), tmp_path / "m")
    check(model, Asset(exported.asset))
    floats = 4 * sum(p.numel() for p in model.parameters())
    assert exported.size_bytes < 0.75 * floats


def test_core_ml_refuses_vectors_with_scales_by_name(tmp_path):
    with pytest.raises(UserError, match=r"weight: coremltools writes no tables of vectors with a scale"):
        export_coreml(compressed(BOTH), inputs("gpt2"), tmp_path / "m", scaled_tables=True)
