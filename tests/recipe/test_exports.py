"""What the specs of export formats say before anything is imported, and that all who ask get it."""

from importlib import metadata
from importlib.util import find_spec

import pytest
from kit.report_sample import recipe

from mptrain.core.errors import UserError
from mptrain.flow import preflight
from mptrain.recipe import EXPORTS, CoreMl
from mptrain.recipe.method import Weights

OPT = {"path": "m", "task": "causal-lm"}


def weight_only(**how):
    return {"id": "w", "quantize": {"mode": "weight_only", "bits": 4, **how}}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (weight_only(), r"stages\.w\.quantize\.bits: export\.ml cannot hold it: needs minimum_deployment_target iOS18"),
        (
            weight_only(bits=8, granularity="channel", overrides={"q": {"bits": 4}}),
            r"stages\.w\.quantize\.overrides\.q: export\.ml cannot hold it",
        ),
        (
            {"id": "w", "palettize": {"method": "kmeans", "granularity": "tensor", "embeddings": 3}},
            r"stages\.w\.palettize\.embeddings: .*one scalar table of 1, 2, 4, 6 or 8 bits",
        ),
        (
            {"id": "w", "palettize": {"method": "kmeans", "granularity": "tensor", "per_channel_scale": True}},
            r"stages\.w\.palettize\.bits: .*set scaled_tables: true",
        ),
    ],
)
def test_weights_that_a_target_cannot_hold_are_refused_before_training(stage, message):
    export = {"id": "ml", "format": "coreml", "of": ["w"], "minimum_deployment_target": "iOS17"}
    found = recipe(model=OPT, stages=[{"id": "dense", "train": {"epochs": 1, "lr": 1e-4}}, stage], export=[export])
    with pytest.raises(UserError, match=message):
        preflight.check_exports(found)
    preflight.check_exports(
        recipe(
            model=OPT,
            stages=[{"id": "dense", "train": {"epochs": 1, "lr": 1e-4}}, stage],
            export=[export | {"minimum_deployment_target": "iOS18", "scaled_tables": True}],
        )
    )


def test_what_a_size_budget_chooses_from_is_no_reason_to_refuse():
    palettize = {"method": "kmeans", "granularity": "tensor", "size_budget": 3.2}
    export = {"id": "ov", "format": "openvino", "of": ["dense"]}
    found = recipe(stages=[{"id": "dense", "palettize": palettize}], export=[export])
    assert [weights for _, weights in found.stages[0].leaves()] == [Weights("tables", 4, "tensor")]


@pytest.mark.parametrize("name", EXPORTS)
def test_a_version_that_was_not_tested_is_refused_before_training(name, monkeypatch):
    package = EXPORTS[name].packages[0]
    if find_spec(package.module) is None:  # in a lane of scripts/lanes.py; `make setup` installs all
        pytest.skip(f"{package.name} is not installed")
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda of: "0.0.1" if of == package.name else version(of))
    export = {"id": "e", "format": name, "of": ["dense"], "precision": ["fp32"]}
    with pytest.raises(UserError, match=rf"made for {package.name} .*, 0\.0\.1 is installed: pip install"):
        preflight.check_exports(recipe(export=[export]))


def test_the_tested_versions_are_those_of_the_extras():
    import tomllib
    from pathlib import Path

    from packaging.requirements import Requirement

    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    extras = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    for spec in EXPORTS.values():
        asked = {r.name: r.specifier for r in map(Requirement, extras[spec.extra])}
        tested = {p: Requirement(f"{p.name}{p.tested}").specifier for p in spec.packages}
        assert asked == {p.name: range for p, range in tested.items() if p.needed}
        for package, range in tested.items():
            if not package.needed:  # only those who use what is exported want it, and its own limits
                (alone,) = map(Requirement, extras[package.name.partition("-")[0]])
                assert (alone.name, alone.specifier) == (package.name, range)
                assert not any(package.name.partition("-")[0] in requirement for requirement in extras["all"])
        assert any(spec.extra in requirement for requirement in extras["all"])


def test_an_unknown_field_is_answered_with_those_of_its_own_format():
    from mptrain.recipe.explain import _fields_at

    export = {"id": "e", "format": "openvino", "of": ["dense"], "route": "trace"}
    assert "route" not in _fields_at(("export", 0), {"export": [export]})
    assert "route" in _fields_at(("export", 0), {"export": [export | {"format": "coreml"}]})


def test_an_older_target_has_no_tables_of_3_bits():
    older = CoreMl.model_validate({"id": "e", "format": "coreml", "of": [], "minimum_deployment_target": "iOS17"})
    assert 3 not in older.widths() and 3 in older.model_copy(update={"minimum_deployment_target": "iOS18"}).widths()


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["openvino", "onnx"], r"export\.onnx \(ONNX\): .*drop throughput, or export to OpenVINO instead"),
        (["coreml", "coreai"], r"export\.coreml \(Core ML\), export\.coreai"),
        (["openvino", "coreml"], None),  # Core ML is not timed here at all
    ],
)
def test_throughput_of_a_runtime_without_such_a_mode_is_refused(formats, message):
    fields = {
        "export": [{"id": name, "format": name, "of": ["dense"], "precision": ["fp32"]} for name in formats],
        "stages": [{"id": "dense", "train": {"epochs": 1, "lr": 1e-4}}],
        "gates": {},
        "evaluate": {"latency": {"throughput": True}},
    }
    if message is None:
        assert recipe(**fields).evaluate.latency.throughput
        return
    with pytest.raises(ValueError, match=message):
        recipe(**fields)


TEXT = {"path": "m", "task": "text-classification"}


@pytest.mark.parametrize(
    ("model", "heads", "message"),
    [
        (TEXT, [{"pool": "mean"}], r"export\.x\.heads: pool is no head for task text-classification"),
        (TEXT, [{"softmax": True}, {"softmax": True}], "softmax is there twice"),
        (TEXT, [{"softmax": True}, {"pool": "cls"}], "go with no model together"),
        (TEXT, [{"topk": 2}, {"argmax": True}], "the first of topk is what argmax chooses"),
        (TEXT, [{"argmax": True}], "has no score of such outputs; export dense to .* without heads too"),
        (TEXT, [{"topk": 2, "softmax": True}], "a head is one of topk, softmax"),
        ({"path": "m", "task": "multi-label-classification"}, [{"softmax": True}], "its models can have topk"),
        ({"path": "m", "task": "embedding"}, [{"normalize": True}, {"pool": "mean"}], "pool comes first"),
        ({"path": "m", "task": "embedding"}, [{"pool": "mean"}, {"normalize": True}], None),
        (TEXT, [{"softmax": True}], None),
        (TEXT, [{"softmax": True}, {"topk": 2}], "has no score of such outputs"),
    ],
)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_heads_that_do_not_fit_are_refused(name, model, heads, message):
    fields = {
        "model": model,
        "data": {"train": "t.csv"},
        "export": [{"id": "x", "format": name, "of": ["dense"], "precision": ["fp32"], "heads": heads}],
        "stages": [{"id": "dense", "train": {"epochs": 1, "lr": 1e-4}}],
        "gates": {},
    }
    if message is None:
        assert recipe(**fields).export[0].heads
        return
    with pytest.raises(ValueError, match=message):
        recipe(**fields)


@pytest.mark.parametrize("name", ["coreml", "coreai"])
def test_heads_with_a_cache_are_refused_where_they_cannot_be_had(name):
    entry = {"id": "x", "format": name, "of": ["dense"], "precision": ["fp32"], "cache": 128, "heads": [{"topk": 3}]}
    with pytest.raises(ValueError, match=r"heads: with cache .* is written without heads here"):
        EXPORTS[name].model_validate(entry)
