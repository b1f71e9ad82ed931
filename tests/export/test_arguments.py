"""Arguments that converters are known to leave out: the exported operation is torch's, or the export is refused."""

from __future__ import annotations

import pytest
import torch
from kit.converted import computed, same
from kit.operations import CASES, PICTURES

from mptrain.core.errors import ExportError
from mptrain.export.torch import arguments

WRONG_WITHOUT = {
    "coreml": [
        "add, alpha",
        "sub, alpha",
        "gelu, tanh",
        "reciprocal, small",
        "rms norm, eps",
        "rms norm, no eps",
        "rms norm, rows of zeros",
        "rms norm, one large channel",
        "softplus, beta and threshold",
        "clamp, tensors, low above high",
        "var, all",
        "hardswish",
    ],
    "coreml trace": [
        "reciprocal, small",
        "rms norm, rows of zeros",
        "std, correction 2",
        "clamp, tensors, low above high",
    ],
    "coreai": ["add, alpha", "where, number", "average pool, no padding counted", "nearest", "var, correction 2"],
    "openvino": ["softplus, beta", "softplus, beta and threshold", "round, decimals", "var, correction 2"],
}
REFUSED = [
    ("coreml", "bucketize, right", "bucketize.right=True"),
    ("coreml", "bilinear, antialias", "_upsample_bilinear2d_aa"),
    ("coreai", "average pool, ceil, padding counted", "avg_pool2d.ceil_mode=True"),
    ("coreai", "bucketize, right", "bucketize.right=True"),
    ("openvino", "average pool, ceil, padding counted", "avg_pool2d.ceil_mode=True"),
    ("onnx", "average pool, divisor", "avg_pool2d.divisor_override=3"),
    ("onnx", "cross entropy", "cross_entropy_loss.label_smoothing=0.1"),
]


def case(name):
    function = CASES.get(name) or PICTURES[name]
    shape = (2, 4, 6) if name in CASES else (1, 4, 7, 8)
    return function, torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, names in WRONG_WITHOUT.items() for name in names])
def test_what_a_converter_does_not_read_is_written_out(route, name, tmp_path):
    function, x = case(name)
    assert same(function(x), computed(route, function, x, tmp_path))


@pytest.mark.parametrize(("route", "name", "said"), REFUSED)
def test_what_cannot_be_written_out_is_refused_by_name(route, name, said, tmp_path):
    function, x = case(name)
    with pytest.raises(ExportError, match=said):
        computed(route, function, x, tmp_path)


def test_a_keyword_that_no_one_knows_to_be_read_is_refused():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.bucketize(x, torch.linspace(-1, 1, 5), right=True), torch.bucketize(x, torch.ones(1))

    graph = torch.export.export(Model(), (torch.ones(3),)).run_decompositions({})
    with pytest.raises(ExportError, match=r"Some format export.*bucketize\(right=True\)\. Write"):
        arguments.check(graph, "Some format", {}, {})
    arguments.check(graph, "Some format", {"bucketize": {"right"}}, {})


def test_a_tanh_gelu_stays_one_operation_in_coreml(tmp_path):
    from mptrain.mil.interpreter import Interpreter

    function, x = case("gelu, tanh")
    computed("coreml", function, x, tmp_path)
    kinds = [op.type for op in Interpreter(tmp_path / "model.mlpackage").program.operations()]
    assert "gelu" in kinds and "tanh" not in kinds


def test_operations_at_their_defaults_are_left_as_they_are():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.addmm(x, x, x) + x - torch.nn.functional.softplus(x)

    graph = torch.export.export(Model(), (torch.ones(3, 3),)).run_decompositions(arguments.decompositions())
    kinds = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert kinds == ["addmm.default", "add.Tensor", "softplus.default", "sub.Tensor"]
