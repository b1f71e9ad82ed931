"""`mptrain.compress`, `export`, `inspect` and `verify` on models in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from kit import tiny
from torch import nn
from transformers import AutoModelForSequenceClassification

import mptrain
from mptrain.core.errors import DataError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.data.load import task_class
from mptrain.recipe import TASKS, Distill, Magnitude, Qat, file


class Net(nn.Module):
    """No model of transformers: named tensors in and out."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x):
        return {"scores": self.down(torch.relu(self.up(x)))}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 32, generator=generator)} for _ in range(24)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_module_of_ones_own_is_inspected(net, batches):
    before = copy.deepcopy(net)
    found = mptrain.inspect(net, batches[0], precisions=["fp32", "bf16-master"])
    assert [block["units"] for block in found.blocks] == [64]
    assert found.memory["fp32"] == 16 * sum(p.numel() for p in net.parameters())
    assert found.keep_fp32 == {"bf16": []}
    assert "What can be cut" in str(found) == repr(found)
    assert "<table>" in found._repr_html_() and "Bytes/parameter" in found._repr_html_()
    assert same(net, before) and net.training


def test_a_module_of_ones_own_is_exported_and_verified(net, batches, here):
    before = copy.deepcopy(net)
    done = mptrain.export(net, "openvino", calibration=batches)
    assert (
        done.passed and done.path.is_file() and done.folder.parent.resolve() == here.resolve()
    ) or done.folder.is_dir()
    assert done.facts["parity"]["max_abs_diff"] < 1e-5 and "<table>" in done._repr_html_() and "OpenVINO" in str(done)
    found = mptrain.verify(done.folder, net, data=batches[:2])
    assert found.passed and found.facts["parity"]["examples"] == 16 and "is the source model" in str(found)
    torch.manual_seed(7)
    assert not mptrain.verify(done.path, Net(), data=batches[:2]).passed
    assert mptrain.verify(done.path).facts["parity"] is None
    assert same(net, before) and net.training
    assert mptrain.export(net, "openvino", data=batches).folder != done.folder  # a new one, nothing is written over


def test_what_is_exported_is_compressed_first_where_the_precision_says_so(net, batches, here):
    before = copy.deepcopy(net)
    done = mptrain.export(net, "openvino", to="int8", precision="int8", calibration=batches)
    assert done.facts["runtime"]["weight_types"]["i8"] == 32 * 64 + 64 * 4
    change = done.facts["compressed"]["change"]
    assert done.passed and done.facts["compressed"]["calibrated_on"] > 0 and 1e-4 < change["relative"] < 0.5
    assert same(net, before)
    with pytest.raises(UserError, match="exists already"):
        mptrain.export(net, "openvino", to="int8", data=batches)


@pytest.mark.parametrize(
    ("methods", "with_data"), [("int8", True), ("int4", False), ("int4", True), ("palette4", False)]
)
def test_a_word_compresses_a_module(net, batches, methods, with_data):
    before = copy.deepcopy(net)
    found = mptrain.compress(net, methods, data=batches if with_data else None)
    with torch.no_grad():
        expected, got = (model.eval()(**batches[0])["scores"] for model in (before, found.model))
    assert 0 < float((expected - got).abs().max()) < 0.3 * float(expected.abs().max())
    assert same(net, before) and is_quantized(found.model) == (methods == "int8")
    assert "<table>" in found._repr_html_() and found.words[0] in str(found)


def test_a_module_is_pruned_at_once_and_exported(net, batches, here):
    found = mptrain.compress(net, Magnitude(method="magnitude", keep={"encoder_params": 0.5}), data=batches)
    assert found.model.up.out_features < 64 == net.up.out_features
    assert found.parameters[1] < found.parameters[0] and "Structure kept" in str(found)
    assert mptrain.export(found.model, "openvino", data=batches).passed


class Reviews(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(4, 12, (64, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": i % 2}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return AutoModelForSequenceClassification.from_pretrained(tiny.save_bert(tmp_path_factory.mktemp("bert")))


def arguments(folder, **changes):
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return mptrain.TrainingArguments(str(folder), **{**fixed, "learning_rate": 1e-3, **changes})


JPQD = {
    "prune": {
        "method": "fisher",
        "keep": {"encoder_params": 0.5},
        "schedule": {"end": 4, "unit": "step"},
    },
    "quantize": {"mode": "qat"},
    "distill": {"weight": 0.5},
}


def test_jpqd_in_one_call(bert, here):
    before = copy.deepcopy(bert)
    found = mptrain.compress(bert, JPQD, data=Reviews(), trainer_args=arguments(here, max_steps=8), teacher="self")
    assert is_quantized(found.model) and found.parameters[1] < found.parameters[0] and same(bert, before)
    assert [(row["phase"], row["step"]) for row in found.history if "loss" in row] == [
        *(("warmup", step) for step in (1, 2, 3, 4)),
        *(("finetune", step) for step in (5, 6, 7, 8)),
    ]
    rates = [row["learning_rate"] for row in found.history if "loss" in row]
    assert rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])  # the boundary does not restart it
    assert all("distill_loss" in row for row in found.history if "loss" in row)
    assert "Structure kept" in str(found) and "Training" in found._repr_html_()
    mptrain.save(found.model, here / "jpqd", tiny.tokenizer())
    batch = {"input_ids": Reviews().ids[:4]}
    assert torch.equal(mptrain.load(here / "jpqd")(**batch).logits, found.model(**batch).logits)


def test_stages_of_a_recipe_run_one_after_the_other(bert, here):
    recipe = tiny.jpqd(here)
    recipe["export"][0]["of"] = ["half"]
    recipe["stages"] = [
        {"id": "dense", "train": {"epochs": 0.5, "lr": 1e-3, "batch_size": 8, "log_steps": 1}},
        {"id": "half", "train": {"epochs": 1, "lr": 1e-3, "batch_size": 16, "log_steps": 1}, "teacher": "dense"}
        | {"prune": {"method": "magnitude", "keep": {"encoder_params": 0.5}}, "distill": {"weight": 0.5}},
    ]
    found = mptrain.compress(bert, file.read(str(tiny.write(recipe, here / "r.yaml"))), data=Reviews())
    assert [(row["stage"], row["step"]) for row in found.history if "loss" in row] == [
        *(("dense", step) for step in (1, 2, 3, 4)),
        *(("half", step) for step in (1, 2, 3, 4)),
    ]
    assert found.parameters[1] < found.parameters[0]


@pytest.mark.parametrize(
    ("methods", "more", "error", "expected"),
    [
        ("int5", {}, UserError, "'int5' is not known; give one of int8"),
        ("int8", {}, UserError, "calibrates on real inputs; give batches or a data set"),
        ({"quantize": {"mode": "qat"}}, {"data": True}, UserError, "qat needs trainer_args"),
        ({"quantize": {"mode": "qta"}}, {}, UserError, "methods: quantize"),
        ([Qat(mode="qat"), Distill()], {"data": True}, UserError, "distill needs a teacher"),
        ([3], {}, UserError, "int is no settings of a method"),
        ("palette4", {"data": 3}, DataError, "must be batches or a data set"),
        ("int4", {"trainer_args": True}, UserError, "data: trainer_args needs it"),
    ],
)
def test_wrong_arguments_say_what_to_give(net, batches, here, methods, more, error, expected):
    given = dict(more)
    if given.get("data") is True:
        given["data"] = batches
    if given.get("trainer_args"):
        given["trainer_args"] = arguments(here, max_steps=2)
    before = copy.deepcopy(net)
    with pytest.raises(error, match=expected):
        mptrain.compress(net, methods, **given)
    assert same(net, before)


def test_a_recipe_whose_teacher_is_not_at_hand_is_refused(net, here):
    recipe = file.read(str(tiny.write(tiny.jpqd(here), here / "r.yaml"))).recipe
    stages = [recipe.stages[0], recipe.stages[0].model_copy(update={"id": "more"}), recipe.stages[1]]
    with pytest.raises(UserError, match="stage jpqd of the recipe learns from dense, which is not at hand"):
        mptrain.compress(net, recipe.model_copy(update={"stages": stages}), data=[{"x": torch.zeros(2, 32)}])


@pytest.mark.parametrize("task", ["seq2seq", "embedding", "token-classification", "text-classification"])
def test_tasks_compare_inputs_without_a_mask(task):
    """All places count, as of a mask of ones; recipes always have one."""
    generator = torch.Generator().manual_seed(0)
    kind = task_class(TASKS[task])
    name = "last_hidden_state" if task == "embedding" else "logits"
    ours, theirs = ({name: torch.randn(4, 6, 5, generator=generator).numpy()} for _ in range(2))
    masks = {mask: torch.ones(4, 6, dtype=torch.long) for mask in ("attention_mask", "decoder_attention_mask")}
    without = kind.agreement(ours, theirs, {"input_ids": torch.zeros(4, 6, dtype=torch.long)})
    assert without.tolist() == kind.agreement(ours, theirs, masks).tolist()
    assert 0 < without.mean() < 1 == kind.agreement(ours, ours, {}).mean()


def test_a_bare_model_without_an_output_to_each_token_is_compared():
    ours = {"logits_per_image": np.eye(4, dtype=np.float32)}
    kind = task_class(TASKS["embedding"])
    assert kind.agreement(ours, ours, {}).tolist() == [1.0] * 4
    assert kind.agreement(ours, {"logits_per_image": np.roll(np.eye(4), 1, 1)}, {}).tolist() == [0.0] * 4


def test_inputs_of_a_module_are_not_made_up(net, here):
    with pytest.raises(UserError, match=r"cannot be made up for Net; give a batch, .*\(x\)"):
        mptrain.export(net, "openvino")


def test_a_boundary_too_many_is_an_error(net, batches):
    work = mptrain.Compression(net, "int4", batches)
    assert work.compressors == [] and work.phase.steps == 0
    work.boundary()
    with pytest.raises(UserError, match="all phases of this compression are over"):
        work.boundary()
    with pytest.raises(UserError, match="give trainer_args"):
        _ = work.arguments


def test_a_budget_against_a_stage_needs_the_recipe(net, batches):
    prune = {"method": "magnitude", "keep": {"speedup": 2.0, "against": "dense"}}
    with pytest.raises(UserError, match=r"keep\.against: dense is a stage of a recipe, which is not at hand here"):
        mptrain.Compression(net, {"prune": prune}, batches)
    with pytest.raises(UserError, match=r"speedup: \[2\.0, 3\.0\] is a family of stages, which a recipe makes"):
        mptrain.Compression(net, {"prune": prune | {"keep": {"speedup": [2.0, 3.0]}}}, batches)


def test_whole_blocks_are_refused_beside_quantizers_before_anything_is_calibrated(net, batches, tmp_path):
    drop = {"method": "curvature", "keep": {"encoder_params": 0.5}, "drop": True, "round_ffn": 4}
    methods = {"prune": drop, "quantize": {"mode": "qat", "start": "joint"}}
    before, arguments = copy.deepcopy(net), mptrain.TrainingArguments(str(tmp_path), max_steps=8, report_to=[])
    with pytest.raises(UserError, match=r"^prune\.drop: a model that carries quantizers cannot lose whole blocks"):
        mptrain.Compression(net, methods, batches, trainer_args=arguments)
    assert same(net, before)


def test_adapters_want_a_training_and_bare_layers(net, batches, tmp_path):
    import peft

    asked, settings = {"adapters": {"rank": 2}}, peft.LoraConfig(r=2, target_modules=["up"])
    with pytest.raises(UserError, match=r"^methods: adapters need trainer_args$"):
        mptrain.Compression(net, asked, batches)
    arguments = mptrain.TrainingArguments(str(tmp_path), max_steps=1, report_to=[])
    with pytest.raises(UserError, match=r"^adapters: .*up has adapters of peft already: merge these"):
        mptrain.Compression(peft.get_peft_model(net, settings), asked, batches, trainer_args=arguments)
