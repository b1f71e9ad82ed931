"""What must hold for every method in the tables: settings that say what it does, and a class that does that."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from kit import report_sample
from kit.tiny_models import inputs, logits, tiny
from kit.tokenizers import wordpiece
from torch import nn

from mptrain.compress.base import Method, Site, Sizes, Tools
from mptrain.compress.methods import METHODS as CLASSES
from mptrain.compress.methods import method_class
from mptrain.compress.weights import records
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.models import artifact
from mptrain.recipe import METHODS, Stage
from mptrain.report.render.card import card
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page

HALF = {"encoder_params": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "movement": {"prune": {"method": "movement", "keep": HALF, "schedule": {"end": 3, "unit": "step"}}},
    "fisher": {"prune": {"method": "fisher", "keep": HALF}},
    "fisher in training": {"prune": {"method": "fisher", "keep": HALF, "schedule": {"end": 3, "unit": "step"}}},
    "fisher, refitted": {"prune": {"method": "fisher", "keep": HALF, "rescale": True}},
    "magnitude": {"prune": {"method": "magnitude", "keep": HALF}},
    "magnitude, size": {"prune": {"method": "magnitude", "keep": {"size": 0.6}}},
    "curvature": {"prune": {"method": "curvature", "keep": HALF}},
    "curvature, whole blocks": {"prune": {"method": "curvature", "keep": {"encoder_params": 0.1}, "drop": True}},
    "qat": {"quantize": {"mode": "qat"}},
    "ptq": {"quantize": {"mode": "ptq", "bits": {"bert.encoder.layer.0.intermediate.dense": 4}}},
    "weight_only": {"quantize": {"mode": "weight_only", "block_size": 16}},
    "weight_only, rounded": {"quantize": {"mode": "weight_only", "method": "rtn", "bits": 8, "granularity": "channel"}},
    "weight_only, budget": {"quantize": {"mode": "weight_only", "block_size": 16, "size_budget": 7.0}},
    "weight_only, trained": {"quantize": {"mode": "weight_only", "block_size": 16, "finetune": {}}},
    "kmeans": {"palettize": {"method": "kmeans", "bits": 3, "granularity": "tensor"}},
    "kmeans, trained": {"palettize": {"method": "kmeans", "bits": 3, "granularity": "tensor", "finetune": {}}},
    "skm": {"palettize": {"method": "skm", "bits": 2, "granularity": "tensor"}},
    "cut": {"vocabulary": {"keep": 40}},
    "cut, of a rank": {"vocabulary": {"keep": 40, "rank": 16}},
    "lora": {"adapters": {"rank": 4}},
}
TOKENS = tiny("bert").config.vocab_size
TRAINED = {"movement", "fisher in training", "qat", "weight_only, trained", "kmeans, trained", "lora"}
TAGS = {"pruning", "quantization", "palettization", "vocabulary pruning", "low-rank adapters"}
STEPS = 4


def stage(case: str) -> Stage:
    train = {"train": {"epochs": 1, "lr": 1e-3}} if case in TRAINED else {}
    content = copy.deepcopy(CASES[case])
    if "prune" in content:  # its epochs are those of the tiny run here
        content["prune"] |= {"min_ffn": 4, "round_ffn": 4}
    return Stage.model_validate({"id": "s", **content, **train})


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def config(case):
    (found,) = stage(case).methods
    return found


def model() -> nn.Module:
    return tiny("bert")


def skeleton() -> nn.Module:
    found = tiny("bert")
    return found.to("meta")


def labelled() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [inputs("bert", batch=4) | {"labels": torch.randint(0, 2, (4,), generator=generator)} for _ in range(3)]


def plain() -> list[dict[str, torch.Tensor]]:
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in labelled()]


def no_data() -> Any:
    raise AssertionError("data that its settings do not ask for")


def tools(config: Any, steps: int) -> Tools:
    needs = config.needs()
    return Tools(
        inputs=plain if "inputs" in needs else no_data,
        labelled=labelled if "labels" in needs else no_data,
        example=lambda: {name: value[:1] for name, value in plain()[0].items()},
        length=8,
        steps=steps,
        steps_per_epoch=STEPS,
        lr=1e-3,
        counts=lambda: torch.arange(TOKENS),
        processor=wordpiece(TOKENS),
    )


def applied(config: Any, steps: int) -> tuple[nn.Module, Method[Any]]:
    """The method on a fresh model, as a phase applies it."""
    torch.manual_seed(0)
    method = method_class(config)(config)
    given = tools(config, steps)
    made = method.prepare(model(), given)
    acting = method.training() if steps else None
    assert acting is not None or not steps or is_quantized(made) or config.freezes
    train(made, acting, steps)
    return method.finalize(made.eval(), given), method


def train(made: nn.Module, acting: Any, steps: int) -> None:
    if not steps:
        return
    made.train()
    groups = [{"params": list(made.parameters())}, *(acting.parameter_groups() if acting else [])]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    if acting is not None:
        acting.follow(None)
    for step, batch in zip(range(steps), labelled() * steps):
        optimizer.zero_grad()
        made(**batch).loss.backward()
        if acting is not None:
            acting.gradients(True)
        optimizer.step()
        if acting is not None:
            acting.updated(step + 1)
            assert all(isinstance(value, float) for value in acting.logs().values())


def steps_of(case: str) -> int:
    return STEPS if case in TRAINED else 0


def test_the_tables_hold_the_same_methods():
    configs = {config for members in METHODS.values() for config in members.values()}
    assert configs == set(CLASSES)
    for field, members in METHODS.items():
        for name, config in members.items():
            assert config.field == field and name in config.names() and config.by in config.model_fields
    assert {case.partition(",")[0].partition(" ")[0] for case in CASES} == {n for m in METHODS.values() for n in m}


def test_settings_say_what_it_does(config):
    assert config.words() and config.tag in TAGS
    for field, weights in config.leaves():
        assert field.startswith(f"{config.field}.") and 1 <= weights.bits <= 8
    assert config.needs() <= {"inputs", "labels"} and config.reads() <= {"target", "bytes", "widths"}


def test_what_it_does_without_a_model_is_right_with_one(case, config):
    """What it leaves and whether shapes change; JSON facts; the same bits again; saved and loaded."""
    dense = model()
    before = {name: p.shape for name, p in dense.named_parameters()}
    made, method = applied(config, steps_of(case))
    after = {n: p.shape for n, p in made.named_parameters() if n in before}
    assert (after != before) == config.reshapes
    leaves = [weights for _, weights in config.leaves()]
    assert is_quantized(made) == any(weights.activations for weights in leaves)
    held = {type(record) for record in records.of(made).values()}
    kinds = {"integers": records.BlockQuantized, "tables": records.Palettized}
    assert held == {kinds[weights.kind] for weights in leaves if not weights.activations}
    facts = method.facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    again, _ = applied(config, steps_of(case))
    states = [m.state_dict() for m in (made, again)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_what_it_makes_is_saved_and_loaded(case, config, tmp_path):
    made, _ = applied(config, steps_of(case))
    artifact.save(made.eval(), tmp_path / "model", None)
    batch = inputs("bert", batch=2)
    batch["input_ids"] %= made.get_input_embeddings().num_embeddings
    assert torch.equal(logits(artifact.load(tmp_path / "model"), batch), logits(made, batch))


def test_settings_that_fit_pass_its_check_and_touch_nothing(config):
    found = skeleton()
    names = [name for name, _ in found.named_modules()]
    method_class(config).check(config, found, Site(config.field, 8))
    assert names == [name for name, _ in found.named_modules()] and all(p.is_meta for p in found.parameters())


def test_a_pattern_without_a_module_is_refused_by_its_check(config):
    patterns = next((name for name in ("ignore", "targets") if name in type(config).model_fields), None)
    if patterns is None:
        assert config.field == "vocabulary"  # of which no module is left out
        return
    wrong = config.model_copy(update={patterns: ["nowhere"]})
    with pytest.raises(UserError, match=rf"^{config.field}\.{patterns}: 'nowhere' matches no module"):
        method_class(config).check(wrong, skeleton(), Site(config.field, 8))


def test_its_outlook_is_near_what_it_makes(case, config):
    """Parameters of the blocks; a dry run says within a factor of two, and budgets are met to a unit."""
    total = sum(p.numel() for p in model().parameters())
    embeddings = sum(m.weight.numel() for m in model().modules() if isinstance(m, nn.Embedding))
    layers = sum(p.numel() for name, p in model().named_parameters() if ".layer." in name)
    dense = Sizes(layers, embeddings, total - layers - embeddings, macs=1e6)
    found = method_class(config).outlook(config, skeleton(), dense)
    made, _ = applied(config, steps_of(case))
    names = {name for name, _ in model().named_parameters()}
    assert found.params == pytest.approx(sum(p.numel() for n, p in made.named_parameters() if n in names), rel=0.1)
    assert (found.layer_bytes is not None or bool(found.tables)) == any(True for _ in config.leaves())
    assert 0 < method_class(config).seconds(config, skeleton(), 100, 1e9) < 3600


def test_a_report_of_it_is_drawn(case):
    described = stage(case).model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    stages = [{"id": "dense", "train": {"epochs": 2, "lr": 1e-4}}, {**described, "id": "jpqd"}]
    export = {"id": "ov", "format": "openvino", "of": ["dense", "jpqd"]}
    recipe = report_sample.recipe(stages=stages, export=[export | {"precision": ["fp32", "int8", "compressed"]}])
    made = report_sample.report(recipe=recipe, methods={})
    (config,) = stage(case).methods
    assert made["methods"]["jpqd"]["words"] == [config.words()]
    assert config.words() in card(made) and config.tag in card(made)
    assert markdown(made) and page(made)
