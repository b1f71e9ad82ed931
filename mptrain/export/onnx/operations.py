"""Which operations of a torch graph have no ONNX form, all of them: torch's exporter stops at the first.

The graph is taken apart as torch.onnx does it, into what its functions are written for; what is left without one is
what lacks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _fx_passes, _registration

_OURS = "onnx_symbolic"
"""operations of ONNX by name, which `recurrence` puts in"""


def lacking(program: ExportedProgram) -> list[str]:
    """Names of operations, "special_bessel_j0.default", sorted."""
    registry = _registry()
    graph = _fx_passes.remove_assertion_nodes(_fx_passes.decompose_with_registry(program, registry).graph_module)
    found: set[str] = set()
    for module in graph.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            target = node.target
            if isinstance(target, OpOverload) and target.namespace != _OURS and not registry.is_registered(target):
                found.add(str(target).removeprefix("aten."))
    return sorted(found)


@cache
def _registry() -> Any:
    return _registration.ONNXRegistry.from_torchlib()
