"""The recipe format: strictness, line numbers, overrides, and every bundled file."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mptrain.core.errors import RecipeError
from mptrain.recipe import Gates, Output, Recipe, file

TEXT = (file.folder("recipes") / "jpqd-bert.yaml").read_text()


def read(tmp_path, text, overrides=()):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return file.read(str(path), list(overrides)).recipe


def line_of(text, part):
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("method: curvature", "method: curvatur", ["prune.method", "'curvatur'", "Did you mean 'curvature'"]),
        ("keep: {", "kep: {", ["stages.jpqd.prune.kep: unknown field", "Did you mean 'keep'"]),
        ("seed: 42", "seed: 42\nseed: 43", ["'seed' appears twice", "first on line"]),
        ("seed: 42", "seed: off", ["seed", "integer", "'off'"]),
        ("attn: sdpa", "attn: sdp", ["model.attn", "'sdp'", "Did you mean 'sdpa'"]),
        ("method: curvature,", "method: fisher, schedule: {end: 3},", ["prune.schedule.end", "train.epochs"]),
        ("    teacher: dense\n", "", ["stages.jpqd", "distill needs a teacher"]),
        ("teacher: dense", "teacher: dense\n    regularisation: 1", ["stages.jpqd.regularisation: unknown field"]),
        ("encoder_params: 0.33", "encoder_params: 0.33, macs: 0.5", ["stages.jpqd.prune.keep", "exactly one"]),
        ("name: jpqd-bert", "name: ../evil", ["name", "[a-z0-9._-]+"]),
        ("task: text-classification", "task: text-clasification", ["model.task", "Did you mean 'text-classification'"]),
        ("of: [dense, jpqd]", "of: [dense, jqpd]", ["export.ov.of", "'jqpd' is not a stage"]),
        ("schema: mptrain/v1", "schema: !!python/name:os.system mptrain/v1", ["tag", "not allowed"]),
    ],
)
def test_errors_name_the_line_the_field_and_the_fix(tmp_path, old, new, expected):
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    for part in [*expected, "r.yaml:"]:
        assert part in str(error.value)


def test_tokens_are_replaced_where_targets_are_of_whole_texts(tmp_path):
    some = "distill: {replace_tokens: 0.15,"
    text = TEXT.replace("distill: {", some)
    assert read(tmp_path, text).stages[-1].distill.replace_tokens == 0.15
    for task in ("token-classification", "question-answering", "image-classification"):
        with pytest.raises(RecipeError, match=f"distill.replace_tokens: the targets of {task} are not of whole texts"):
            read(tmp_path, text, [f"model.task={task}"])
    with pytest.raises(RecipeError, match=r"set train\.batch_size above 1"):
        read(tmp_path, text, ["stages.jpqd.train.batch_size=1"])


def test_the_line_number_is_the_line_of_the_field(tmp_path):
    text = TEXT.replace("temperature: 2", "temperature: warm")
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    assert f"r.yaml:{line_of(text, 'warm')}: stages.jpqd.distill.temperature" in str(error.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [("1e-5", 1e-5), ("1.0e-4", 1e-4), (".5", 0.5), ("-3", -3), ("off", "off"), ("yes", "yes"), ("True", True),
     ("null", None), ("0x10", "0x10"), ("1_000", "1_000"), ("12:30", "12:30"), ("1.", 1.0)],
)  # fmt: skip
def test_scalars_are_yaml_1_2(word, value):
    got = file.scalar(word)
    assert got == value and type(got) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_python_float_is_read_back(number):
    assert file.scalar(repr(number)) == number


def test_set_addresses_stages_and_exports_by_id(tmp_path):
    recipe = read(tmp_path, TEXT, ["stages.jpqd.prune.keep.encoder_params=0.4", "export.ov.precision=[fp32]", "seed=7"])
    assert recipe.stage("jpqd").prune.keep.encoder_params == 0.4
    assert recipe.export[0].precision == ["fp32"]
    assert recipe.seed == 7
    assert recipe.stage("dense").train.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1", "stages.dense.train.lr or stages.jpqd.train.lr"),
        ("stages.jqpd.train.lr=1", "Did you mean 'jpqd'"),
        ("stages.jpqd.train.lrr=1", "Did you mean 'lr'"),
        ("sed=1", "Did you mean 'seed'"),
        ("seed", "KEY=VALUE"),
        ("seed.x=1", "seed: input should be a valid integer"),
        ("stages.jpqd.teacher=dens", "'dens' is neither a stage nor a folder. Did you mean 'dense'?"),
        ("stages.jpqd.teacher=jpqd", "'jpqd' is no earlier stage"),
        ("stages.jpqd.teacher=./nothere", "there is no folder ./nothere"),
        ("gates.min_speedup.b1_s100_t1=2", "is not measured by evaluate.latency"),
        ("stages.dense.train.lr='\"1e-3\"'", "stages.dense.train.lr: input should be a valid number"),
        ("stages.dense.train.lr=true", "stages.dense.train.lr: input should be a valid number"),
        ("stages.dense.train.lr=1e999", "stages.dense.train.lr: input should be a finite number"),
        ("stages.dense.train.keep_best=no", "Write false"),
        ("seed=true", "seed: input should be a valid integer"),
    ],
)
def test_a_wrong_set_says_what_was_meant(tmp_path, override, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        read(tmp_path, TEXT, [override])


def test_a_teacher_reads_the_tokens_of_its_student(tmp_path):
    with pytest.raises(RecipeError, match=r"'fewer' reads fewer tokens .* or take another teacher"):
        read(tmp_path, TEXT, ["stages.jpqd.from=dense", "stages.jpqd.teacher=fewer"])
    assert read(tmp_path, TEXT, ["stages.jpqd.teacher=fewer"]).stage("jpqd").teacher == "fewer"


PRESETS = (
    TEXT
    + """
presets:
  tiny: {stages.dense.train.epochs: 0.1, export.ov.precision: [fp32], data.max_samples: 40}
"""
)


def test_a_preset_sets_what_it_holds_and_a_later_set_wins(tmp_path):
    assert read(tmp_path, PRESETS).stage("dense").train.epochs != 0.1
    recipe = read(tmp_path, PRESETS, ["preset=tiny", "data.max_samples=50"])
    assert recipe.stage("dense").train.epochs == 0.1 and recipe.export[0].precision == ["fp32"]
    assert recipe.data.max_samples == 50


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        (PRESETS, "preset=small", "there is no such preset; the recipe's are tiny"),
        (TEXT, "preset=tiny", "there is no such preset; the recipe has none"),
        (PRESETS.replace("stages.dense", "stages.dens"), "seed=1", "presets.tiny: --set stages.dens.train.epochs"),
        (PRESETS.replace("0.1", "-1"), "seed=1", "stages.dense.train.epochs: input should be greater than 0"),
        (PRESETS.replace("{stages", "{preset: tiny, stages"), "seed=1", "'preset' is not a field of a recipe"),
        (TEXT + "presets: [tiny]", "preset=tiny", "there is no such preset"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(tmp_path, text, override, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        read(tmp_path, text, [override])


@pytest.mark.parametrize("path", file.bundled(), ids=lambda p: p.stem)
def test_bundled_recipes_are_valid_named_like_their_file_and_round_trip(path):
    recipe = file.read(path.stem).recipe
    assert recipe.name == path.stem
    assert recipe.description
    assert recipe.output.dir == f"runs/{path.stem}"
    again = file.validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True))), "dump")
    keyless = recipe.data.model_copy(update={"key": None})  # where the key is goes into no dump
    assert again == recipe.model_copy(update={"data": keyless})


LLM = (file.folder("recipes") / "int4-llm.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("export.ov.cache=100", "prompt and tokens are 128, more than export.ov.cache, 100"),
        ("export.ov.cache=null", "evaluate.generation: no export keeps a cache for it; give one of openvino or onnx"),
        ("evaluate.generation.prompt=300", "evaluate.generation.prompt: 300 is more than data.max_length, 256"),
        ("evaluate.generation.tokens=1", "evaluate.generation.tokens: input should be greater than 1"),
    ],
)
def test_text_that_cannot_be_generated_is_refused(tmp_path, change, expected):
    changes = ["data.max_length=80", "data.stride=null"] if "cache=100" in change else []
    with pytest.raises(RecipeError, match=re.escape(expected)):
        read(tmp_path, LLM, [*changes, change])


def test_a_local_file_comes_before_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file.find("jpqd-bert").parent == file.folder("recipes")
    (tmp_path / "jpqd-bert.yaml").write_text(TEXT.replace("seed: 42", "seed: 5"))
    assert file.read("jpqd-bert").recipe.seed == 5
    with pytest.raises(RecipeError, match="Did you mean jpqd-bert"):
        file.find("jpqd-brt")


def test_the_schema_is_json_and_closed():
    schema = json.loads(json.dumps(Recipe.model_json_schema(by_alias=True)))
    assert {"schema", "name", "model", "data", "stages"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("text", ["", "- a", "just words", "a: &x [*x]", "? [a, b]\n: c", "{", "\t- a", "a: b: c"])
def test_files_that_are_no_recipe_are_refused_in_words(tmp_path, text):
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    assert "Traceback" not in str(error.value) and "r.yaml" in str(error.value)


@given(st.text(max_size=80))
def test_any_text_is_a_recipe_error_or_nothing_worse(text):
    try:
        data, lines = file.parse(text, "r.yaml")
        if isinstance(data, dict):
            file.validate(data, "r.yaml", lines)
    except RecipeError:
        pass


def test_ids_with_dots_are_reached_by_overrides(tmp_path):
    text = TEXT.replace("id: jpqd", "id: jpqd.v1.2").replace("of: [dense, jpqd]", "of: [dense, jpqd.v1.2]")
    recipe = read(tmp_path, text, ["stages.jpqd.v1.2.train.lr=0.5", "stages.dense.train.lr=0.25"])
    assert (recipe.stage("jpqd.v1.2").train.lr, recipe.stage("dense").train.lr) == (0.5, 0.25)
    with pytest.raises(RecipeError, match=r"stages\.jpqd\.v9"):
        read(tmp_path, text, ["stages.jpqd.v9.train.lr=0.5"])


def test_names_that_are_folders_already_are_refused(tmp_path):
    for name in (".", ".."):
        with pytest.raises(RecipeError, match="is no name, for folders are called after it"):
            read(tmp_path, TEXT.replace("id: dense", f"id: '{name}'"))


def test_deep_nesting_is_an_error_of_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match="nested too deeply"):
        read(tmp_path, "[" * 5000 + "]" * 5000)


def test_the_output_folder_may_be_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path, TEXT, ["output.dir=~/runs/x"]).output.dir == str(tmp_path / "runs" / "x")


def test_every_field_of_gates_and_output_is_described():
    for model in (Gates, Output):
        assert all(field.description for field in model.model_fields.values())


def test_blocks_that_do_not_divide_what_an_earlier_stage_left_are_refused():
    found = yaml.safe_load((file.folder("recipes") / "prune-once.yaml").read_text(encoding="utf-8"))
    once = next(stage for stage in found["stages"] if "prune" in stage)
    once["prune"]["round_ffn"] = 48
    int4 = {"id": "int4", "quantize": {"mode": "weight_only", "block_size": 32}}
    found["stages"] = [once, int4]
    found["export"] = [{"id": "ov", "format": "openvino", "of": ["int4"], "precision": ["compressed"]}]
    found["gates"] = {}
    with pytest.raises(RecipeError, match=r"stages\.int4\.quantize\.block_size: blocks of 32 do not divide FFN widths"):
        file.validate(found, "x")
    once["prune"]["round_ffn"] = 96
    file.validate(found, "x")


def test_maps_of_attentions_that_may_be_gone_are_not_compared():
    found = yaml.safe_load((file.folder("recipes") / "jpqd-bert.yaml").read_text(encoding="utf-8"))
    jpqd = found["stages"][-1]
    jpqd["prune"]["drop"] = True
    found["model"]["attn"] = "eager"
    jpqd["distill"] |= {"attention": 1.0}
    with pytest.raises(RecipeError, match=r"stages\.jpqd\.distill\.attention: stage 'jpqd' may leave out whole"):
        file.validate(found, "x")
    jpqd["distill"] |= {"attention": 0.0}
    file.validate(found, "x")
