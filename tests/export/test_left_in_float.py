"""The nodes of an IR that stay in float because `ignore` named their module or operation."""

import openvino as ov
import pytest
import torch
from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.core.signature import probed
from mptrain.export.openvino.write import XML, write
from mptrain.recipe import Ptq
from mptrain.report.tables import models

WIDTH = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool, self.last = nn.Linear(WIDTH, WIDTH), Powers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return {"logits": self.last(self.pool(self.first(x)))}


class Powers(nn.Module):
    def forward(self, x):
        return (x.abs() + 0.1).pow(2.0).pow(3.0) * x.sign()


def exported(ignore, folder):
    config = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional", "ignore": ignore})
    batch = {"x": torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))}
    model = quantizers.quantize(Net().eval(), config, [batch])
    found = write(model, batch, folder, precision="int8", signature=probed(model, batch)).left
    nodes = {node.get_friendly_name(): node for node in ov.Core().read_model(folder / XML).get_ops()}
    return found, nodes


@pytest.mark.parametrize(
    ("ignore", "expected"),
    [
        ([], None),
        (["pool/pow/1"], {"pool/pow/1": ["aten::pow/Power_1"]}),
        (["pool/pow"], {"pool/pow/0": ["aten::pow/Power"], "pool/pow/1": ["aten::pow/Power_1"]}),
        (["last/linear"], {"last/linear/0": ["aten::linear/MatMul", "aten::linear/Add"]}),
        (["last"], {"last": ["aten::linear/MatMul", "aten::linear/Add"]}),
    ],
)
def test_they_are_in_the_file_and_read_nothing_quantized(tmp_path, ignore, expected):
    found, nodes = exported(ignore, tmp_path)
    assert found == (
        None
        if expected is None
        else {
            scope: [f"__module.{scope.partition('/')[0]}/{name}" for name in names] for scope, names in expected.items()
        }
    )
    left = {name for names in (found or {}).values() for name in names}
    for name, node in nodes.items():
        reads = [value.get_node().get_type_name() for value in node.input_values()]
        if node.get_type_name() in ("Power", "MatMul"):
            assert ("FakeQuantize" in reads) == (name not in left), name


def test_the_report_lists_them():
    runtime = {"left_in_float": {"gem/mean/0": ["__module.gem/aten::mean/ReduceMean"], "gem/abs/0": []}}
    shown = models.layer_lists({"variants": [{"id": "found_int8", "runtime": runtime}]})
    assert shown == [
        ("gem/mean/0 in float in found_int8 (1)", ["__module.gem/aten::mean/ReduceMean"]),
        ("gem/abs/0 in float in found_int8 (0)", ["no node of its own"]),
    ]
