import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptrain.compress.structure.scopes import matches, openvino_module, resolve
from mptrain.core.errors import UserError

NAMES = [
    "",
    "bert",
    "bert.embeddings",
    "bert.embeddings.word_embeddings",
    *(f"bert.encoder.layer.{i}{part}" for i in range(12) for part in ("", ".attention.output.dense", ".output.dense")),
    "bert.pooler.dense",
    "classifier",
]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("encoder.layer.1", "bert.encoder.layer.1.output.dense", True),
        ("encoder.layer.1", "bert.encoder.layer.10", False),
        ("classifier", "classifier", True),
        ("class", "classifier", False),
        ("embeddings", "bert.embeddings.word_embeddings", True),
        ("word_embeddings.weight", "bert.embeddings.word_embeddings", False),
        ("re:layer\\.1", "bert.encoder.layer.10", True),
        ("re:.*attention\\.output.*", "bert.encoder.layer.3.attention.output.dense", True),
        ("re:^output", "bert.encoder.layer.3.output", False),
        ("re:output$", "bert.encoder.layer.3.output", True),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


component = st.sampled_from(["a", "b", "layer", "0", "1", "10", "out"])
dotted = st.lists(component, min_size=1, max_size=5).map(".".join)


@given(dotted, dotted)
def test_a_plain_pattern_is_a_run_of_components(pattern, name):
    wanted, parts = pattern.split("."), name.split(".")
    runs = [parts[i : i + len(wanted)] for i in range(len(parts))]
    assert matches(pattern, name) == (wanted in runs)


@given(dotted, dotted)
def test_a_regular_expression_is_searched(pattern, name):
    assert matches("re:" + re.escape(pattern), name) == (pattern in name)


def test_resolve_takes_along_everything_below():
    assert resolve(["encoder.layer.1", "re:pooler$"], [*NAMES, "bert.pooler"], "ignore") == {
        "bert.encoder.layer.1",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.output.dense",
        "bert.pooler",
        "bert.pooler.dense",
    }
    assert resolve([], NAMES, "ignore") == set()


def test_an_unmatched_pattern_names_the_field_and_near_names():
    with pytest.raises(UserError, match=r"quantize\.ignore: 'encoder\.layers\.1'.*'encoder\.layer\.1'"):
        resolve(["bert", "encoder.layers.1"], NAMES, "quantize.ignore")
    with pytest.raises(UserError, match=r"modules are named like .*'classifier'"):
        resolve(["zzzzzzzzzz"], NAMES, "quantize.ignore")
    with pytest.raises(UserError, match=r"quantize\.bits: 're:\(' is not a regular expression"):
        resolve(["re:("], NAMES, "quantize.bits")


def test_openvino_names():
    name = "__module.bert.encoder.layer.3.output.dense/aten::linear/MatMul"
    assert openvino_module(name) == "bert.encoder.layer.3.output.dense"
    assert openvino_module("MatMul_4711") is None
