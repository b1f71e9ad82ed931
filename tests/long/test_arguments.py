"""Every exporter, every operation with other arguments than its defaults: equal to torch, or refused by name."""

from __future__ import annotations

import pytest
import torch
from kit.converted import ROUTES, computed, same
from kit.operations import CASES, PICTURES

from mptrain.core.errors import ExportError

pytestmark = [
    pytest.mark.long,
    # coremltools leaves the temporary folder of a conversion that fails to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TABLE = [*((name, function, (2, 4, 6)) for name, function in CASES.items())]
TABLE += [*((name, function, (1, 4, 7, 8)) for name, function in PICTURES.items())]
FEWEST = {"coreml": 105, "coreml trace": 95, "coreai": 95, "openvino": 120, "onnx": 130}
"""cases that each converts; the others it refuses"""


@pytest.mark.parametrize("route", ROUTES)
def test_operations_with_other_arguments_are_right_or_refused(route, tmp_path):
    wrong, right = [], 0
    for index, (name, function, shape) in enumerate(TABLE):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        folder = tmp_path / str(index)
        folder.mkdir()
        try:
            found = computed(route, function, x, folder)
        except ExportError:
            continue
        right += same(function(x), found)
        if not same(function(x), found):
            wrong.append(name)
    assert not wrong
    assert right >= FEWEST[route]
