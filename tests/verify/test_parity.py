import copy
import json
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from kit.tiny_models import inputs, tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mptrain.compress.quantize import quantizers
from mptrain.core.errors import ExportError, NotFinite
from mptrain.export.openvino import facts as ir
from mptrain.export.openvino.facts import stored_types
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.recipe import Qat
from mptrain.verify.parity import compare, judged


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{precision: (torch model, runner)} of a tiny BERT whose second layer is left in fp32 when quantized."""
    folder, model = tmp_path_factory.mktemp("ir"), tiny("bert")
    q = quantizers.quantize(model, Qat(mode="qat", ignore=["encoder.layer.1"]), [inputs("bert")])
    found = {}
    for precision, source in (("fp32", model), ("int8", q)):
        done = export_openvino(
            source, inputs("bert"), folder / precision, precision=precision, embeddings="int8", processor=None
        )
        found[precision] = (source, CompiledIr(done.xml, threads=1))
    return found


def facts(runner):
    return ir.facts(runner.compiled, runner.xml, runner.precision).as_json()


# -- facts


def layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_facts_of_a_plain_model(exported):
    model, runner = exported["fp32"]
    found = facts(runner)
    assert (found["fused_attention"], found["attention_layers"]) == (2, 2)
    assert found["int8_layers"] == []
    assert set(found["fp32_layers"]) == layers(model)
    assert found["inference_precision"] == "f32"
    assert list(found["weight_types"]) == ["f32"]
    # the classifier's weights and everything else; only position ids and the like are no weights
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert parameters <= found["weight_types"]["f32"] <= parameters + 200
    assert json.loads(json.dumps(found)) == found


def test_facts_of_a_quantized_model(exported):
    model, runner = exported["int8"]
    found = facts(runner)
    assert (found["fused_attention"], found["attention_layers"]) == (2, 2)
    ignored = {name for name in layers(model) if "encoder.layer.1" in name}
    assert set(found["fp32_layers"]) == ignored and len(ignored) == 6
    assert set(found["int8_layers"]) == layers(model) - ignored
    assert found["weight_types"]["i8"] > 0 and found["weight_types"]["f32"] > 0


def test_attention_that_is_not_fused_is_seen(exported):
    _, runner = exported["fp32"]
    split = ov.Core().compile_model(runner.xml, "CPU", {"SNIPPETS_MODE": "DISABLE", "INFERENCE_PRECISION_HINT": "f32"})
    found = facts(SimpleNamespace(compiled=split, xml=runner.xml, precision="f32"))
    assert (found["fused_attention"], found["attention_layers"]) == (0, 2)


def test_a_layer_with_only_its_weight_compressed_is_no_int8_layer(exported, tmp_path):
    import nncf

    from mptrain.core.silence import silenced

    _, runner = exported["fp32"]
    with silenced():
        graph = nncf.compress_weights(ov.Core().read_model(runner.xml), mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(graph, tmp_path / "weights.xml", compress_to_fp16=False)
    found = facts(CompiledIr(tmp_path / "weights.xml"))
    assert found["int8_layers"] == [] and len(found["fp32_layers"]) == 14
    assert found["weight_types"]["i8"] > 10000


def test_what_the_plugin_took_is_read_back(exported):
    _, runner = exported["fp32"]
    for hint in ("bf16", "f16"):
        other = CompiledIr(runner.xml, precision=hint)
        assert other.precision in (hint, "bf16", "f32")  # a CPU without fp16 arithmetic may take bf16 for f16
        assert facts(other)["inference_precision"] == other.precision


def test_stored_types_counts_bytes():
    constants = [ov.opset13.constant(np.zeros((3, 5), dtype)) for dtype in (np.float32, np.int8, np.float16, np.int64)]
    model = ov.Model([ov.opset13.result(c) for c in constants], [])
    assert stored_types(model) == {"f32": 60, "f16": 30, "i8": 15}


# -- parity


def outputs(model, batch):
    with torch.no_grad():
        return {name: v.numpy() for name, v in model(**batch).items() if isinstance(v, torch.Tensor)}


def test_parity_of_the_ir(exported):
    model, runner = exported["fp32"]
    found = compare(model, runner, [inputs("bert", seed=i) for i in range(3)])
    assert found["examples"] == 9 and found["agreement"] == 1
    assert 0 <= found["mean_abs_diff"] <= found["max_abs_diff"] < 1e-5


def test_parity_measures_what_differs():
    model, batches = tiny("bert").train(), [inputs("bert", seed=i) for i in range(2)]

    def off(batch):
        logits = outputs(model.eval(), batch)["logits"]
        logits[1, 2] += 100
        return {"logits": logits}

    expected = np.mean([outputs(model.eval(), b)["logits"][1].argmax() == 2 for b in batches])
    model.train()
    found = compare(model, off, batches)
    assert found["max_abs_diff"] == pytest.approx(100, abs=1e-4)
    assert found["mean_abs_diff"] == pytest.approx(100 / 9, abs=1e-4)
    assert found["agreement"] == pytest.approx((2 + expected) / 3)
    assert found["examples"] == 6
    assert model.training


def test_differences_are_relative_to_the_size_of_the_output():
    class Large(torch.nn.Module):
        def forward(self, x):
            return {"logits": 20 * x, "small": 1e-3 * x}

    x = torch.tensor([[1.0, -0.5], [0.25, 0.75]])
    found = compare(Large(), lambda batch: {"logits": (20 * x + 2e-4).numpy(), "small": (1e-3 * x).numpy()}, [{"x": x}])
    assert found["max_abs_diff"] == pytest.approx(2e-4, rel=0.02)
    assert found["relative"] == pytest.approx(1e-5, rel=0.02), "2e-4 of logits of 20 is rounding"
    off = compare(Large(), lambda batch: {"logits": (20 * x).numpy(), "small": (1e-3 * x + 5e-5).numpy()}, [{"x": x}])
    assert off["relative"] == pytest.approx(0.05, rel=0.02), "5e-5 of outputs of 1e-3 is no rounding"


def test_padding_is_not_compared():
    model, batch = tiny("llama"), inputs("llama")

    def off_at_padding(batch):
        logits = outputs(model, batch)["logits"]
        logits[batch["attention_mask"].numpy() == 0] = 1e6
        return {"logits": logits}

    assert compare(model, off_at_padding, [batch])["max_abs_diff"] == 0
    assert compare(model, off_at_padding, [batch])["agreement"] == 1
    batch.pop("attention_mask")
    found = compare(model, lambda b: {"logits": outputs(model, b)["logits"] + 1}, [batch])
    assert found["mean_abs_diff"] == pytest.approx(1, abs=1e-6)


def test_other_shapes_are_refused_and_nan_is_not_hidden():
    model = tiny("bert")
    with pytest.raises(ExportError, match=r"output logits: the exported model gives \(3, 2\)"):
        compare(model, lambda b: {"logits": outputs(model, b)["logits"][:, :2]}, [inputs("bert")])

    def with_nan(batch):
        logits = outputs(model, batch)["logits"]
        logits[0, 0] = np.nan
        return {"logits": logits}

    with pytest.raises(NotFinite, match="output logits: 1 of 9 values of the exported model are not finite"):
        compare(model, with_nan, [inputs("bert")])


def test_of_models_with_one_output_the_order_of_the_examples_counts():
    """Their argmax is always the same, so that any two rerankers agreed."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return {"logits": x * self.weight}

    batch = {"x": torch.tensor([[1.0], [2.0], [3.0], [4.0]])}
    model = Scores()
    found = [
        compare(model, lambda b, f=f: {"logits": f(b["x"].numpy())}, [batch])["agreement"]
        for f in (lambda x: 5 * x + 1, lambda x: -x, lambda x: x[[1, 0, 2, 3]])
    ]
    assert found == [1.0, 0.0, pytest.approx(5 / 6)], "one of six pairs is the other way round"


class Cancels(nn.Module):
    """Sums of 4,000 values of some 500 of which almost nothing is left."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        large = 500 * torch.randn(2000, generator=draw)
        self.weight = nn.Parameter(torch.cat([large, -large + 1e-3]))

    def forward(self, x):
        return {"logits": (x * self.weight).sum(1, keepdim=True)}


def test_what_two_orders_of_summation_differ_by_is_no_fault():
    model, x = Cancels(), torch.ones(4, 4000)

    weight = model.weight.detach().clone()

    def another_order(batch, weight=weight):
        return {"logits": (batch["x"] * weight).double().flip(1).sum(1, keepdim=True).float().numpy()}

    found = compare(model, another_order, [{"x": x}])
    assert found["max_abs_diff"] / float(model(x)["logits"].detach().abs().max()) > 1e-4, "as float32 sums"
    assert found["relative"] < 1e-4 and found["rounding"] > 0
    changed = weight.clone()
    changed[weight.argmax()] *= 1.001
    off = compare(model, lambda batch: another_order(batch, changed), [{"x": x}])
    assert off["relative"] > 1e-4


def test_a_deep_llama_is_right_in_another_order_and_wrong_with_one_weight_off():
    config = LlamaConfig(
        **{"vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 30},
        **{"num_attention_heads": 3, "num_key_value_heads": 3, "initializer_range": 0.3},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 2
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def exported(**changed):
        other = copy.deepcopy(model).double()
        for name, factor in changed.items():
            dict(other.named_parameters())[name.replace("__", ".")].data *= factor
        return lambda given: {"logits": outputs(other, given)["logits"].astype(np.float32)}

    found = compare(model, exported(), [batch])
    assert found["max_abs_diff"] > 1e-4 > 2 * found["relative"], "rounding of logits of 20"
    for name in ("lm_head__weight", "model__layers__15__mlp__down_proj__weight"):
        assert compare(model, exported(**{name: 1.001}), [batch])["relative"] > 1e-4


class Chosen(nn.Module):
    """The place of the largest of its inputs; wrong: of so many of the first rows the place after it."""

    def __init__(self, wrong=0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        found = x.argmax(-1)
        return {"indices": found + (torch.arange(len(found)) < self.wrong)}


def test_choices_have_no_difference_and_are_judged_by_agreement():
    batch = {"x": torch.randn(10, 4)}
    for wrong, passed in ((0, True), (4, False)):
        right, other = Chosen(), Chosen(wrong)
        found = compare(right, lambda b: {k: v.numpy() for k, v in other(**b).items()}, [batch])  # noqa: B023
        assert found["relative"] == 0.0 and not found["numbers"] and found["agreement"] == 1 - wrong / 10
        assert judged(found, exact=True) == {"judged_by": "agreement", "passed": passed, "limit": 0.9}
    with pytest.raises(ExportError, match="in 40% of the places alone"):
        compare(Chosen(), lambda b: {k: v.numpy() for k, v in Chosen(6)(**b).items()}, [batch])
