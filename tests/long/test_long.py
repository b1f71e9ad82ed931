"""The long matrices, soak and fuzz of `make test-all`."""

from __future__ import annotations

import copy
import itertools
import json
import random
import signal
import subprocess
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import tiny
from kit.jobs import command, differences, metrics, run

from mptrain.core.errors import RecipeError
from mptrain.recipe import Recipe, file

pytestmark = pytest.mark.long

METHODS = {
    "fisher": {"method": "fisher", "keep": {"encoder_params": 0.5}, "schedule": {"end": 1}},
    "fisher at once": {"method": "fisher", "keep": {"encoder_params": 0.5}},
    "fisher rescaled": {"method": "fisher", "keep": {"macs": 0.5}, "schedule": {"end": 1}, "rescale": True},
    "fisher latency": {"method": "fisher", "keep": {"latency": 0.8}, "schedule": {"end": 1}},
    "magnitude": {"method": "magnitude", "keep": {"heads": 0.5, "ffn": 0.5}, "schedule": {"end": 1}},
    "movement blocks": {
        "method": "movement", "keep": {"encoder_params": 0.5}, "attention_block": [8, 8], "schedule": {"end": 1},
    },
    "movement shared": {
        "method": "movement", "keep": {"encoder_params": 0.5}, "score": "shared", "score_lr": 0.01,
        "schedule": {"end": 1},
    },
    "movement regularized": {
        "method": "movement", "regularization": 0.5, "attention_block": [8, 8], "score_lr": 0.05,
        "schedule": {"start": 0.2, "end": 2},
    },
}  # fmt: skip
QUANTIZE = [{"start": "joint"}, {"start": "joint", "carry": "recalibrate"}, {"start": "after_prune"}]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_order(tmp_path, method, attention):
    """Each finishes, exports models that agree with torch, and is smaller."""
    if method == "fisher latency":  # a layer of the small one takes as long with few channels as with all
        tiny.save_bert(tmp_path / "bert", ffn=2048)
        tiny.save_reviews(tmp_path / "reviews.csv")
    for options in QUANTIZE:
        described = tiny.jpqd(tmp_path)
        described["model"]["attn"] = attention
        described["output"]["dir"] = str(tmp_path / "-".join(options.values()))
        if method == "fisher latency":
            described["stages"][0]["train"]["lr"] = described["stages"][1]["train"]["lr"] = 1e-3
        described["stages"][1] |= {"prune": METHODS[method], "quantize": {"mode": "qat", **options}}
        if attention == "eager":
            described["stages"][1]["distill"] = {"weight": 0.5, "hidden": 0.1, "attention": 0.1}
        run(tiny.write(described, tmp_path / "recipe.yaml"))
        report = json.loads((tmp_path / "-".join(options.values()) / "report.json").read_text())
        base, pruned, *_ = report["variants"]
        assert all(gate["passed"] for gate in report["gates"]), report["gates"]
        assert pruned["params"] < base["params"] or method == "movement regularized"
        assert pruned["metrics"]["accuracy"]["value"] > 0.6


def test_runs_killed_again_and_again_reach_the_same_numbers(tmp_path):
    """Soak: kill -9 at random moments, until a run gets through."""
    draw = random.Random(0)
    described = tiny.jpqd(tmp_path)
    recipe = tiny.write(described, tmp_path / "tiny.yaml")
    begun = time.monotonic()
    run(recipe)
    whole = time.monotonic() - begun
    described["output"]["dir"] = str(tmp_path / "again")
    recipe = tiny.write(described, tmp_path / "again.yaml")
    kills = 0
    for patience in itertools.count(1):
        process = subprocess.Popen(command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            status = process.wait(timeout=draw.uniform(0.3, 0.6) * whole * (1 + patience / 10))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert status == 0
        break
    assert kills >= 2
    assert not differences(metrics(tmp_path / "again"), metrics(tmp_path / "run"))


def test_the_same_recipe_twice_gives_the_same_numbers(tmp_path):
    described = tiny.jpqd(tmp_path)
    run(tiny.write(described, tmp_path / "a.yaml"))
    described["output"]["dir"] = str(tmp_path / "b")
    run(tiny.write(described, tmp_path / "b.yaml"))
    assert not differences(metrics(tmp_path / "run"), metrics(tmp_path / "b"))


BUNDLED = [yaml.safe_load(path.read_text()) for path in file.bundled()]
NOISE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


def places(value, path=()):
    """All paths into nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_recipe_with_anything_anywhere_is_a_recipe_or_an_error(data):
    described = copy.deepcopy(data.draw(st.sampled_from(BUNDLED)))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(sorted(places(described), key=repr)))
        here = described
        for key in path:
            here = here[key]
        action = data.draw(st.sampled_from(["replace", "drop", "rename"]))
        if action == "replace" or isinstance(here, list):
            here[last] = data.draw(NOISE)
        else:
            value = here.pop(last)
            if action == "rename":
                here[data.draw(st.text(max_size=8))] = value
    try:
        checked = file.validate(described, "fuzz.yaml")
    except RecipeError as error:
        assert "Traceback" not in str(error) and len(str(error)) < 20_000
    else:
        assert isinstance(checked, Recipe)
        written = yaml.safe_load(yaml.safe_dump(checked.model_dump(mode="json", by_alias=True)))
        for recipe in (written, described):  # where a key lies is never written
            recipe["data"].pop("key", None)
        assert file.validate(written, "again.yaml") == file.validate(described, "fuzz.yaml")


@settings(max_examples=3000, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_recipe_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        file.read(str(path))
