"""A few cells of the conversion matrix, and all of them among the long tests."""

from __future__ import annotations

import pytest

from benchmarks.export import coreml_matrix

FEW = ["roberta/eager/trace/mask/fixed", "vit/sdpa/export/nomask/ranged"]


def check(name, folder):
    row = coreml_matrix.row(name, folder)
    assert row["converted"], row["error"]
    assert row["parity_fp32"] <= 1e-5
    assert row["cosine_fp16"] >= 0.9999


def test_the_matrix_is_whole():
    names = coreml_matrix.names()
    assert len(names) == len(set(names)) == 5 * 2 * 2 * 2 * 2 + 2 * 2 * 2


@pytest.mark.long
@pytest.mark.parametrize("name", FEW)
def test_a_cell_converts_and_computes_what_the_model_does(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in coreml_matrix.names() if name not in FEW])
def test_every_cell(name, tmp_path):
    check(name, tmp_path)
