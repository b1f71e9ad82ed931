"""Core ML packages of `mptrain export` take the lengths that were asked for and that the model reads."""

from __future__ import annotations

import pytest
from kit import tiny, tiny_models
from kit.long import except_for

from mptrain.commands.export import export_model
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import CoreMl, CoreMlShapes


def bounds(facts, name):
    program = Interpreter(facts["path"]).program
    return next(feature.bounds for feature in program.inputs if feature.name == name)


@pytest.mark.long
@pytest.mark.parametrize(("length", "longest"), except_for([(24, 24), (256, 64)], [(256, 64)]))
def test_the_length_is_that_of_max_length_or_of_the_positions(length, longest, tmp_path):
    tiny.save_bert(tmp_path / "bert")  # 64 positions
    (tmp_path / "texts.txt").write_text("good film\nbad plot was not so good\n" * 4)
    facts = export_model(
        str(tmp_path / "bert"),
        tmp_path / "to",
        format="coreml",
        data=str(tmp_path / "texts.txt"),
        length=length,
        samples=4,
    )
    assert facts["passed"] and bounds(facts, "input_ids")[1] == (1, longest)


@pytest.mark.long
def test_a_sound_keeps_its_length(tmp_path):
    tiny_models.tiny("wav2vec2", feat_extract_norm="layer").save_pretrained(tmp_path / "sound")
    facts = export_model(str(tmp_path / "sound"), tmp_path / "to", format="coreml", length=2000, samples=4)
    low, high = bounds(facts, "input_values")[1]
    assert low == high > 128 and facts["passed"]


def test_shapes_that_are_given_stay():
    given = CoreMl(id="c", format="coreml", of=["m"], shapes=CoreMlShapes(length=[1, 7]))
    assert given.sized(64, True) == given
    assert CoreMl(id="c", format="coreml", of=["m"]).sized(64, True).shapes.length == [1, 64]
