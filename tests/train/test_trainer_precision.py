"""mptrain.Trainer with `precision`: a drop-in with half compute weights, fp32 masters and exact resume."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from kit.training import AtTheStart, Poison, Rows, arguments, masters, model, same
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from mptrain import MasterWeights, Trainer, TrainingArguments
from mptrain.core.errors import TrainingError, UserError
from mptrain.train.checkpoint import FOREIGN, load_state

MODES = ["fp16-master", "bf16-master", "bf16-split"]
DTYPES = {"fp16-master": torch.float16, "bf16-master": torch.bfloat16, "bf16-split": torch.bfloat16}
HIGH = {"compute": "fp16", "loss_scale": {"init": 2.0**24}}  # the first steps overflow


def trainer(folder, precision, m=None, **kwargs):
    own = {k: kwargs.pop(k) for k in ("callbacks", "compute_metrics", "optimizers", "train_dataset") if k in kwargs}
    torch.manual_seed(2)
    own.setdefault("train_dataset", Rows())
    return Trainer(m or model(), arguments(folder, precision=precision, **kwargs), eval_dataset=Rows(16), **own)


def train(folder, precision, resume=None, **kwargs):
    t = trainer(folder, precision, **kwargs)
    t.train(resume_from_checkpoint=resume)
    return t


def logged(t, key):
    return [e[key] for e in t.state.log_history if key in e]


# -- arguments


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("fp16-master", {"compute": "fp16", "master": "fp32"}),
        ("bf16-split", {"compute": "bf16", "master": "split"}),
        ("fp32", {"compute": "fp32", "master": "fp32"}),
        ({"compute": "bf16", "keep_fp32": ["norms"]}, {"compute": "bf16", "keep_fp32": ["norms"]}),
        ('{"compute": "fp16", "loss_scale": 8}', {"compute": "fp16", "master": "fp32"}),
    ],
)
def test_precision_is_a_short_name_or_the_mapping_of_a_recipe(tmp_path, value, expected):
    found = arguments(tmp_path, precision=value)
    assert {k: found.precision[k] for k in expected} == expected
    assert json.loads(found.to_json_string())["precision"] == found.precision
    command = ["--output_dir", str(tmp_path), "--precision", value if isinstance(value, str) else json.dumps(value)]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command)
    assert parsed.precision == found.precision


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "fp16"}, r"precision: must be a mapping or one of fp32, bf16-master, .* got 'fp16'"),
        ({"precision": "bf16-master", "bf16": True}, "precision='bf16-master' together with bf16=True"),
        ({"precision": "fp32", "fp16": True}, "together with fp16=True"),
        ({"precision": {"compute": "fp16", "master": "split"}}, "master split needs compute bf16, got fp16"),
        ({"precision": {"compute": "bf16", "keep": []}}, r"precision\.keep: unknown field; fields are compute"),
        ({"precision": {"compute": "fp8"}}, r"precision\.compute: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ({"precision": "{compute: fp16}"}, "is not JSON"),
        ({"precision": {"compute": "fp16", "loss_scale": {"start": 1}}}, r"start: unknown field; fields are init"),
        ({"precision": {"master": "split"}}, r"precision\.compute is missing, in \{'master': 'split'\}"),
        ({"precision": ["bf16"]}, r"must be a mapping or one of fp32, .* got \['bf16'\]"),
    ],
)
def test_wrong_precisions_are_named(tmp_path, kwargs, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, **kwargs)


def test_autocast_from_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="mixed_precision='bf16' exclude each other"):
        trainer(tmp_path, "bf16-master")


def test_fp32_is_transformers_trainer(tmp_path):
    ours = train(tmp_path, "fp32")
    torch.manual_seed(2)
    plain = transformers.TrainingArguments(**{**vars_of(tmp_path)})
    theirs = transformers.Trainer(model(), plain, train_dataset=Rows())
    theirs.train()
    assert ours.master_weights is None
    assert same(dict(ours.model.state_dict()), dict(theirs.model.state_dict()))


def vars_of(folder):
    names = "max_steps per_device_train_batch_size learning_rate use_cpu report_to save_strategy logging_steps"
    found = arguments(folder)
    return {n: getattr(found, n) for n in f"{names} disable_tqdm dataloader_pin_memory output_dir".split()}


# -- training


@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_trains_as_fp32_does(tmp_path, precision, accumulation):
    options = dict(gradient_accumulation_steps=accumulation, max_grad_norm=0.5, lr_scheduler_type="cosine")
    options |= dict(optim="sgd", learning_rate=0.1)  # Adam divides by gradients that are noise
    options |= dict(m=model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    half = train(tmp_path, precision, **options)
    options |= dict(m=model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    plain = train(tmp_path, "fp32", **options)
    assert half.model.classifier.weight.dtype == DTYPES[precision]
    skipped = half.master_weights.skipped_steps
    assert skipped == 0
    assert logged(half, "learning_rate") == logged(plain, "learning_rate")
    tolerance = 2e-3 if precision == "fp16-master" else 2e-2
    for key in ("loss", "grad_norm"):
        assert logged(half, key) == pytest.approx(logged(plain, key), rel=5 * tolerance)
    for n, m in masters(half).items():
        assert m.dtype == torch.float32
        assert (m - plain.model.get_parameter(n)).norm() < tolerance * (1 + plain.model.get_parameter(n).norm())
    assert half.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=tolerance)
    assert logged(half, "precision/grad_norm") == pytest.approx(logged(half, "grad_norm"))
    assert logged(half, "precision/loss_scale")[-1] == (1.0 if precision != "fp16-master" else 2.0**16)


def test_norms_kept_in_fp32_and_a_static_scale(tmp_path):
    t = train(tmp_path, {"compute": "fp16", "keep_fp32": ["norms"], "loss_scale": 128}, max_steps=3)
    kept = {n for n, p in t.model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in t.model.named_parameters() if "LayerNorm" in n}
    assert logged(t, "precision/loss_scale") == [128.0] * 3


def test_callbacks_metrics_and_the_best_model(tmp_path):
    seen = {"order": [], "predictions": []}

    class Spy(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen["order"].append("pre")

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen["order"].append("post")
            seen["optimizer"] = optimizer

    def metrics(prediction):
        seen["predictions"].append(prediction.predictions)
        return {"score": -len(seen["predictions"])}  # the first evaluation is the best

    options = dict(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, save_total_limit=1)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="score")
    t = train(tmp_path, "bf16-master", callbacks=[Spy()], compute_metrics=metrics, **options)
    assert seen["order"] == ["pre", "post"] * 12
    assert isinstance(seen["optimizer"].optimizer, MasterWeights)
    assert all(p.dtype == "float32" for p in seen["predictions"])
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    now = masters(t)
    assert all(torch.equal(now[n], best[n]) for n in now)
    assert torch.equal(t.model.classifier.weight, best["classifier.weight"].bfloat16())
    assert t.predict(Rows(8)).predictions.dtype == "float32"


def test_an_optimizer_and_scheduler_of_the_user(tmp_path):
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    t = train(tmp_path, "bf16-master", m=m, optimizers=(optimizer, scheduler), max_steps=3)
    assert t.master_weights.optimizer is optimizer
    assert logged(t, "learning_rate") == [0.1, 0.05, 0.025]


def test_masters_that_the_user_built(tmp_path):
    m = model()
    mw = MasterWeights(m, torch.optim.AdamW(m.parameters(), lr=1e-3), "fp16", loss_scale=512)
    t = train(tmp_path, None, m=m, optimizers=(mw, None), max_steps=3)
    assert t.master_weights is mw
    assert logged(t, "precision/loss_scale") == [512.0] * 3
    assert int(mw.flats[0].steps.max()) == 3


def test_training_goes_on_when_train_is_called_again(tmp_path):
    t = trainer(tmp_path, "bf16-master", max_steps=3)
    t.train()
    first, mw = masters(t), t.master_weights
    t.train()
    assert t.master_weights is mw
    assert not same(first, masters(t))
    t.evaluate()
    m = t.release()
    assert {p.dtype for p in m.parameters()} == {torch.float32} and t.master_weights is None
    t.train()
    assert t.master_weights is not None


@pytest.mark.parametrize("flag", ["fp16_full_eval", "bf16_full_eval"])
@pytest.mark.parametrize("precision", [*MODES, {"compute": "fp16", "keep_fp32": ["norms"]}], ids=[*MODES, "norms"])
def test_half_evaluation_changes_no_weight_and_no_buffer(tmp_path, precision, flag):
    """transformers casts the model for it, so what is saved or trained after it would start from rounded weights."""
    m = model()
    m.register_buffer("frequencies", torch.tensor([0.1, 0.2]))
    t = trainer(tmp_path, precision, m=m, max_steps=2, **{flag: True})
    fresh = {n: p.clone() for n, p in m.state_dict().items()}
    half = t.evaluate()["eval_loss"]
    assert same(fresh, m.state_dict())
    t.args.fp16_full_eval = t.args.bf16_full_eval = False
    whole = t.evaluate()["eval_loss"]
    assert half == pytest.approx(whole, rel=1e-3) and half != whole
    setattr(t.args, flag, True)
    t.train()
    expected = masters(t)
    assert t.predict(Rows(8)).predictions.dtype == "float32"
    assert same(masters(t), expected) and torch.equal(m.frequencies, torch.tensor([0.1, 0.2]))
    t.save_model(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(tensors[n], x) for n, x in expected.items())
    t.train()
    assert t.master_weights.skipped_steps == 0 and not same(masters(t), expected)


# -- what is saved


@pytest.mark.parametrize("precision", MODES)
def test_saved_models_are_the_masters_and_half_ones_say_so(tmp_path, precision):
    t = train(tmp_path / "run", precision, max_steps=3)
    t.save_model(tmp_path / "fp32")
    config = json.loads((tmp_path / "fp32" / "config.json").read_text())
    tensors = load_file(tmp_path / "fp32" / "model.safetensors")
    assert config["dtype"] == "float32"
    assert all(torch.equal(tensors[n], m) and tensors[n].dtype == m.dtype for n, m in masters(t).items())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fp32")
    assert loaded.dtype == torch.float32
    t.model.save_pretrained(tmp_path / "same")
    assert same(load_file(tmp_path / "same" / "model.safetensors"), tensors)
    copy.deepcopy(t.model).to(DTYPES[precision]).save_pretrained(tmp_path / "half")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == DTYPES[precision]
    assert f"torch.{json.loads((tmp_path / 'half' / 'config.json').read_text())['dtype']}" == str(DTYPES[precision])
    assert t.model.classifier.weight.dtype == DTYPES[precision]


def test_a_half_checkpoint_does_not_become_the_master_in_silence(tmp_path, caplog):
    train(tmp_path, "bf16-master", m=model().bfloat16(), max_steps=1)
    assert "trained parameters arrive in bfloat16" in caplog.text
    caplog.clear()
    train(tmp_path, "bf16-master", max_steps=1)
    assert "arrive in" not in caplog.text


@pytest.mark.parametrize("precision", [*MODES, HIGH], ids=[*MODES, "after skipped steps"])
def test_resume_is_bit_identical(tmp_path, precision):
    whole = train(tmp_path / "whole", precision, gradient_accumulation_steps=2)
    train(tmp_path / "part", precision, gradient_accumulation_steps=2, save_strategy="steps", save_steps=7)
    folder = tmp_path / "part" / "checkpoint-7"
    assert {p.suffix for p in folder.iterdir() if p.name not in FOREIGN} <= {".json", ".safetensors"}
    resumed = train(tmp_path / "part", precision, resume=str(folder), gradient_accumulation_steps=2, m=model(seed=9))
    assert resumed.state.global_step == 12
    assert same(masters(resumed), masters(whole))
    assert resumed.master_weights.logs() == whole.master_weights.logs()
    assert logged(resumed, "loss")[-5:] == logged(whole, "loss")[-5:]
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    if precision is HIGH:
        assert resumed.master_weights.skipped_steps > 3


def test_an_fp32_run_goes_on_from_a_half_one_and_the_other_way_around(tmp_path):
    half = train(tmp_path / "half", "bf16-master", max_steps=4, save_strategy="steps", save_steps=4)
    t = train(tmp_path / "half", None, resume=str(tmp_path / "half" / "checkpoint-4"), max_steps=4)
    assert same({n: p.detach() for n, p in t.model.named_parameters()}, masters(half))
    plain = train(tmp_path / "plain", None, max_steps=4, save_strategy="steps", save_steps=2)
    start = AtTheStart()
    t = start.attach(trainer(tmp_path / "plain", "bf16-master", max_steps=4))
    folder = tmp_path / "plain" / "checkpoint-2"
    t.train(resume_from_checkpoint=str(folder))
    assert same(start.weights, load_file(folder / "model.safetensors"))
    assert start.has_moments(load_state(folder / "optimizer")["state"])
    for n, p in plain.model.named_parameters():
        assert (masters(t)[n] - p).norm() < 0.02 * (1 + p.norm())


# -- overflow drill


def test_overflows_forced_from_2_to_the_24_skip_steps_and_hold_the_schedule(tmp_path):
    t = train(tmp_path, HIGH, max_steps=20, lr_scheduler_type="linear", warmup_steps=0)
    skipped = t.master_weights.skipped_steps
    assert 3 < skipped < 16
    scales = logged(t, "precision/loss_scale")
    assert scales[:4] == [2.0 ** (24 - i) for i in range(1, 5)]
    assert logged(t, "precision/skipped_steps")[-1] == skipped
    rates = logged(t, "learning_rate")
    assert len(set(rates)) == 20 - skipped + (rates[-1] == 0)
    assert t.lr_scheduler.last_epoch == 20 - skipped
    assert all(math.isfinite(x) for x in logged(t, "loss"))
    assert all(m.isfinite().all() for m in masters(t).values())
    assert int(t.master_weights.flats[0].steps.max()) == 20 - skipped


@pytest.mark.parametrize("precision", MODES)
def test_a_nan_batch_is_skipped(tmp_path, precision):
    m = model()
    t = train(tmp_path, precision, m=m, callbacks=[Poison(m, 2, 4)], max_steps=6)
    assert t.master_weights.skipped_steps == 2
    assert t.lr_scheduler.last_epoch == 4
    assert all(x.isfinite().all() for x in masters(t).values())


@pytest.mark.parametrize("precision", ["fp16-master", "bf16-split"])
def test_nan_data_for_good_ends_with_the_diagnosis_and_the_masters(tmp_path, precision):
    m = model()
    scale = {"init": 4, "floor": 2, "patience": 3} if precision == "fp16-master" else None
    compute, _, kind = precision.partition("-")
    mapping = {"compute": compute, "master": "split" if kind == "split" else "fp32", "loss_scale": scale}
    if scale is None:
        mapping["loss_scale"] = {"init": 1, "floor": 1, "ceiling": 1, "interval": None, "patience": 3}
    t = trainer(tmp_path, mapping, m=m, callbacks=[Poison(m, 2, 99)])
    with pytest.raises(TrainingError) as error:
        t.train()
    assert "3 optimizer steps in a row were skipped with the loss scale at its floor" in str(error.value)
    assert "finite inputs became non-finite in: bert.embeddings" in str(error.value)
    assert t.state.global_step == (2 + 1 + 2 if scale else 2 + 2)
    assert all(x.isfinite().all() for x in masters(t).values())
