"""OpenVINO IR in fp16, with what fp16 would break left in fp32.

    weights      stored in fp16, but for constants that fp16 distorts: OpenVINO itself would clip what is above
                 65504 and make 0 of what is below 6e-8, without a word
    operations   on devices that compute in fp16 (GPU, NPU, CPUs with fp16) all do, but for those that a search on
                 calibration inputs found: they carry `DisablePrecisionConversion`, which plugins honour

The Python API cannot set that attribute, so it goes into the XML of an IR in fp32, which is then read again.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from torch import Tensor, nn

from mptrain.core.errors import ExportError
from mptrain.core.signature import Signature, without_cache
from mptrain.export.openvino.recurrence import graphs_of
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.traceable import traceable_masks
from mptrain.verify import overflow
from mptrain.verify.overflow import Found, Op
from mptrain.verify.programs.aten import TorchOps
from mptrain.verify.ranges import HALF_MAX

_MAX_CHANGE = 2.0**-8
"""of a constant's norm; rounding to fp16 changes 2^-12, unless values are below 6e-5"""
_ATTRIBUTE = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_SCOPE = re.compile(r"__module\.(?P<module>[^/]+)/aten::(?P<call>\w+)/(?P<type>[A-Za-z]+)(?:_(?P<number>\d+))?")
_TRACED = {
    "addmm": "linear",
    "mm": "linear",
    "bmm": "matmul",
    "convolution": "_convolution",
    "_to_copy": "to",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "native_layer_norm": "layer_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_group_norm": "group_norm",
}
"""what a trace calls the ATen operations that run"""
_FOLDED = {"native_batch_norm", "_native_batch_norm_legit_no_training"}
"""conversion may put these into the weights of the convolution before: their large numbers are gone with them"""


def find(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signature: Signature) -> tuple[Found, list[Op]]:
    """The ops to keep in fp32, and all ops, of the model with the masks that it is exported with."""
    shown = partial(signature.call, model, batches[0])
    with traceable_masks(), without_cache(model), real_arithmetic(model, shown):
        program = TorchOps(model, batches, signature)
        return overflow.search(program), list(program.ops)


def marked(graph: ov.Model, keep: Collection[str], ops: Sequence[Op]) -> tuple[ov.Model, list[str], list[str]]:
    """(the graph to save with compress_to_fp16, names of the nodes and of the constants that stay fp32).

    Raises ExportError when an operation to keep is not in the graph.
    """
    nodes = {name for op in ops if op.name in keep for name in _nodes(graph, op, ops)}
    constants = [
        node.get_friendly_name()
        for inner in graphs_of(graph)
        for node in inner.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.f32 and _distorted(node.data)
    ]
    return _with_attribute(graph, {*nodes, *constants}), sorted(nodes), constants


def _distorted(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    if not known.size:
        return False
    if np.abs(known).max() > HALF_MAX:
        return True
    change = np.linalg.norm((known - known.astype(np.float16).astype(np.float32)).ravel())
    return bool(change > _MAX_CHANGE * np.linalg.norm(known.ravel()))


def _nodes(graph: ov.Model, op: Op, ops: Sequence[Op]) -> list[str]:
    """Nodes made from an op. Where calls cannot be told apart, those of all calls of its kind in its module."""
    kind = "scaled_dot_product_attention" if op.kind.startswith("_scaled_dot_product") else op.kind
    calls = {kind, _TRACED.get(kind, kind)}
    # `model` is also the scope of a trace's outermost forward
    modules = {op.module or "model"}
    by_type: dict[str, list[tuple[int, str]]] = {}
    for node in graph.get_ops():
        found = _SCOPE.fullmatch(node.get_friendly_name())
        if found and found["module"] in modules and found["call"].rstrip("_") in calls:
            by_type.setdefault(found["type"], []).append((int(found["number"] or 0), node.get_friendly_name()))
    if not by_type and op.kind in _FOLDED:
        return []
    if not by_type:
        raise ExportError(
            f"{op.name} must stay in fp32 in an fp16 export, and the IR has no node of that name. Export it as fp32, or"
            " change the model so that its values stay below 65504."
        )
    alike = [o.name for o in ops if (o.module, o.kind) == (op.module, op.kind)]
    names = []
    for nodes in by_type.values():
        ordered = [name for _, name in sorted(nodes)]
        names += [ordered[alike.index(op.name)]] if len(ordered) == len(alike) else ordered
    return names


def _with_attribute(graph: ov.Model, names: Iterable[str]) -> ov.Model:
    """The graph with fp16 forbidden for the nodes of these names."""
    wanted = set(names)
    if not wanted:
        return graph
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(graph, path, compress_to_fp16=False)
        tree = ElementTree.parse(path)
        for layer in tree.getroot().iter("layer"):
            if layer.get("name") in wanted:
                info = layer.find("rt_info")
                if info is None:
                    info = ElementTree.Element("rt_info")
                    layer.insert(1 if layer.find("data") is not None else 0, info)
                ElementTree.SubElement(info, "attribute", _ATTRIBUTE)
        tree.write(path)
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})  # the weights outlive the folder
        return core.read_model(path)


def described(found: Found, nodes: Sequence[str], constants: Sequence[str]) -> dict[str, Any]:
    """JSON facts for the report; executed: filled in where a device here computes in fp16."""
    return {**overflow.described(found), "nodes": list(nodes), "constants": list(constants), "executed": None}
