"""MasterWeights in a plain loop: what it updates, skips, accumulates, saves and says."""

import gc
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mptrain.compress.prune.masked import MaskedWeights
from mptrain.core.errors import ResumeError, TrainingError, UserError
from mptrain.precision import LossScale, MasterWeights
from mptrain.precision.flat import BLOCK
from mptrain.train.checkpoint import load_state, save_state

MODES = [("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "split")]
KERNELS = ["native", "torch"]


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))


def data(i, rows=8):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def loss_of(model, i):
    x, y = data(i)
    return nn.functional.cross_entropy(model(x), y)


def wrap(model, dtype="bf16", master="fp32", optimizer=torch.optim.AdamW, settings=None, **options):
    return MasterWeights(model, optimizer(model.parameters(), **(settings or {"lr": 1e-2})), dtype, master, **options)


def train(mw, model, steps):
    losses = []
    for i in steps:
        loss = loss_of(model, i)
        mw.backward(loss)
        mw.step()
        losses.append(loss.item())
    return losses


def masters(mw):
    return {n: m.clone() for n, m in mw.masters.read().items()}


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_masters_follow_torch_optim_on_the_same_gradients(name, dtype, master, kernel):
    """Gradients of the half model, unscaled and clipped by torch, drive torch's optimizer in fp32."""
    optimizer, settings = OPTIMIZERS[name]
    if master == "split" and name in ("amsgrad", "rmsprop", "adagrad", "nadam"):
        return
    model = make_model()
    plain = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    reference = optimizer(plain.values(), **settings)
    mw = wrap(model, dtype, master, optimizer, settings, loss_scale=256.0, max_grad_norm=0.5, kernel=kernel)
    for i in range(5):
        mw.backward(loss_of(model, i))
        for n, p in model.named_parameters():
            plain[n].grad = p.grad.float() / 256.0
        norm = nn.utils.clip_grad_norm_(plain.values(), 0.5)
        reference.step()
        assert mw.step()
        assert mw.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert all(p.grad is None for p in model.parameters())
        for n, m in mw.masters.read().items():
            torch.testing.assert_close(m, plain[n].detach(), rtol=1e-5, atol=1e-6)
            if master == "fp32":
                assert torch.equal(model.get_parameter(n), m.to(model.get_parameter(n).dtype))


def test_clip_grad_norm_replaces_the_one_of_torch():
    first, second = make_model(), make_model()
    a, b = wrap(first, max_grad_norm=0.1), wrap(second)
    for i in range(3):
        a.backward(loss_of(first, i))
        b.backward(loss_of(second, i))
        norm = b.clip_grad_norm(0.1)
        assert a.step() and b.step()
        assert float(norm) == pytest.approx(a.grad_norm) and a.grad_norm > 0.1
    assert all(torch.equal(masters(a)[n], m) for n, m in masters(b).items())
    b.backward(loss_of(second, 0))
    b.step()  # no clip this time
    assert b.grad_norm > 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_loop_takes_three_changed_lines(dtype):
    model, plain = make_model(), make_model()
    optimizer, reference = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    other = torch.optim.lr_scheduler.LinearLR(reference, 1.0, 0.1, 20)
    mw = MasterWeights(model, optimizer, dtype)
    for i in range(20):
        optimizer.zero_grad()
        loss, expected = loss_of(model, i), loss_of(plain, i)
        mw.backward(loss)
        if mw.step():
            scheduler.step()
        expected.backward()
        reference.step()
        other.step()
        reference.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), abs=2e-2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert isinstance(mw, torch.optim.Optimizer)


def test_scheduler_built_on_master_weights_works_too():
    model = make_model()
    mw = wrap(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(mw, lambda step: 0.5**step)
    train(mw, model, [0])
    scheduler.step()
    assert mw.optimizer.param_groups[0]["lr"] == 5e-3


def test_step_hooks_of_the_optimizer_run_once_a_step():
    model, calls = make_model(), []
    mw = wrap(model)
    mw.optimizer.register_step_post_hook(lambda *_: calls.append(mw.masters.read()["0.weight"].clone()))
    train(mw, model, [0, 1])
    assert len(calls) == 2
    assert torch.equal(calls[1], mw.masters.read()["0.weight"])


def test_gradients_that_do_not_carry_the_loss_scale_are_refused():
    """`loss.backward()` by habit, or Accelerate's, would train with a 65536th of the gradient."""
    model = make_model()
    mw = wrap(model, "fp16", optimizer=torch.optim.SGD)
    before = masters(mw)
    train(mw, model, [0])
    loss_of(model, 1).backward()
    with pytest.raises(UserError, match=r"not multiplied by the loss scale \(65536\).* call backward\(loss\)"):
        mw.step()
    mw.zero_grad()
    train(mw, model, [1])
    assert not torch.equal(before["0.weight"], masters(mw)["0.weight"])
    plain = wrap(make_model(), "bf16")  # its scale is 1
    loss_of(plain.model, 0).backward()
    assert plain.step() and plain.grad_norm > 0


@pytest.mark.parametrize(("dtype", "micro"), [("fp16", 1), ("bf16", 2)])
def test_clipping_the_half_gradients_is_refused(dtype, micro):
    """The norm of scaled fp16 gradients is soon inf, and dividing by it leaves none."""
    model = make_model()
    mw = wrap(model, dtype)
    for i in range(micro):
        mw.backward(loss_of(model, i))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UserError, match=r"changed between backward and step.* max_grad_norm=…"):
        mw.step()
    mw.zero_grad()
    train(mw, model, [0])


# -- memory


def allocated(profile):
    """Bytes held after every allocation and release."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total, held = 0, []
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        held.append(total)
    return held


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_setting_up_peaks_at_twice_the_weights_and_leaves_six_bytes(dtype, master):
    sizes = [(512, 256), (256, 512), (1024, 64), (16,), (512, 512)]
    gc.collect()  # what earlier tests left in circles would be released within the profile
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model = nn.ParameterList([nn.Parameter(torch.zeros(s)) for s in sizes])
        elements = sum(p.numel() for p in model.parameters())
        mw = MasterWeights(model, torch.optim.AdamW(model.parameters()), dtype, master)
    held = allocated(profile)
    assert 4 * elements in held  # the fp32 weights alone
    assert max(held) <= 8 * elements + (20 * BLOCK if master == "split" else 1024)
    assert master == "split" or max(held) >= 8 * elements  # split masters may free weights on the way
    assert held[-1] <= (6 if master == "fp32" else 4) * elements + 1024
    assert mw.flats[0].numel == elements


def test_a_step_keeps_its_memory():
    model = make_model()
    mw = wrap(model)
    train(mw, model, [0])
    buffers = [mw.flats[0].half, mw.flats[0].master, *mw.flats[0].states.values()]
    addresses = [b.data_ptr() for b in buffers]
    train(mw, model, [1, 2])
    assert [b.data_ptr() for b in (mw.flats[0].half, mw.flats[0].master, *mw.flats[0].states.values())] == addresses
    assert mw.flats[0].grad is None


# -- accumulation


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_micro_gradients_are_summed_in_fp32(dtype, master, kernel):
    """128 micro-steps: half sums lose what is small against the sum, fp32 sums do not."""
    weight = nn.Parameter(torch.zeros(64))
    model = nn.ParameterList([weight])
    mw = MasterWeights(model, torch.optim.SGD([weight], lr=1.0), dtype, master, loss_scale=1.0, kernel=kernel)
    gradients = (torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) + 3).to(weight.dtype)
    for g in gradients:
        mw.backward((weight * g).sum())
    assert mw.step()
    exact = -gradients.double().sum(0)
    master_error = ((mw.masters.read()["0"] - exact) / exact).abs().max()
    half = torch.zeros(64, dtype=weight.dtype)
    for g in gradients:
        half += g
    half_error = ((half + exact) / exact).abs().max()
    assert master_error < 1e-6 < 1e-4 < half_error
    assert mw.flats[0].grad is not None


@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_accumulation_equals_one_step_on_the_summed_gradients(dtype, master):
    model, other = make_model(), make_model()
    mw, single = wrap(model, dtype, master), wrap(other, dtype, master)
    for i in range(3):
        sums = {}
        for j in range(4):
            mw.backward(loss_of(model, 4 * i + j) / 4)
            single.scale(loss_of(other, 4 * i + j) / 4).backward()
            for n, p in other.named_parameters():
                sums[n] = sums.get(n, 0) + p.grad.float()
                p.grad = None
        for n, (flat, entry) in single.masters.by_name.items():
            flat.view(flat.gradients(), entry).copy_(sums[n])
            entry.accumulated = True
        assert mw.step() and single.step()
    assert all(torch.equal(masters(mw)[n], m) for n, m in masters(single).items())


def test_a_parameter_with_gradient_in_one_micro_step_only():
    class Experts(nn.ModuleList):
        def forward(self, x, expert):
            return self[expert](x)

    model = Experts([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    mw = wrap(model, settings={"lr": 0.1, "weight_decay": 0.5})
    start = masters(mw)
    mw.backward(model(torch.ones(1, 2), 0).sum())
    mw.backward(model(torch.ones(1, 2), 1).sum())
    assert mw.step()
    moved = [not torch.equal(masters(mw)[f"{i}.weight"], start[f"{i}.weight"]) for i in range(3)]
    assert moved == [True, True, False]


def test_zero_grad_drops_accumulated_gradients():
    model = make_model()
    mw = wrap(model)
    start = masters(mw)
    mw.backward(loss_of(model, 0))
    mw.backward(loss_of(model, 1))
    mw.zero_grad()
    assert mw.step()
    assert all(torch.equal(m, start[n]) for n, m in masters(mw).items())


# -- overflow drill


@pytest.mark.parametrize("kernel", KERNELS)
def test_overflows_forced_from_2_to_the_24_lose_no_master(kernel):
    model, calm = make_model(), make_model()
    scale = LossScale(init=2.0**24, floor=1.0)
    mw, reference = wrap(model, "fp16", loss_scale=scale, kernel=kernel), wrap(calm, "fp16", loss_scale=256.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(mw.optimizer, lambda step: 0.9**step)
    start, skipped = masters(mw), 0
    while True:
        mw.backward(loss_of(model, 0))
        if mw.step():
            break
        skipped += 1
        assert mw.loss_scale == 2.0 ** (24 - skipped)
        assert all(torch.equal(m, start[n]) for n, m in masters(mw).items())
        assert not mw.state and scheduler.last_epoch == 0 and mw.param_groups[0]["lr"] == 1e-2
        assert math.isinf(mw.grad_norm) or math.isnan(mw.grad_norm)
    assert 3 < skipped < 20
    assert mw.logs() == {
        "precision/loss_scale": mw.loss_scale,
        "precision/skipped_steps": float(skipped),
        "precision/grad_norm": mw.grad_norm,
    }
    train(reference, calm, [0])  # skipped steps left no trace
    assert all(torch.allclose(m, masters(reference)[n], rtol=1e-4, atol=1e-6) for n, m in masters(mw).items())


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("accumulated", [False, True])
def test_nan_data_is_skipped_also_in_bf16(dtype, master, accumulated):
    model = make_model()
    mw = wrap(model, dtype, master, max_grad_norm=1.0, loss_scale=64.0)
    train(mw, model, [0])
    before = masters(mw), {n: p.detach().clone() for n, p in model.named_parameters()}
    if accumulated:
        mw.backward(loss_of(model, 1))
    mw.backward(model(torch.full((2, 6), torch.nan)).sum())
    assert mw.step() is False
    assert all(torch.equal(m, before[0][n]) for n, m in masters(mw).items())
    assert all(torch.equal(p, before[1][n]) for n, p in model.named_parameters())
    assert mw.skipped_steps == 1
    assert mw.flats[0].steps.max() == 1
    assert all(math.isfinite(loss) for loss in train(mw, model, [1, 2]))


def test_persistent_nan_data_ends_with_a_message_that_blames_the_data():
    model = make_model()
    mw = wrap(model, loss_scale=LossScale.static(1.0, patience=3))
    start = masters(mw)

    def forever():
        while True:
            mw.backward(model(torch.full((2, 6), torch.nan)).sum())
            mw.step()

    with pytest.raises(TrainingError) as error:
        forever()
    message = str(error.value)
    assert mw.skipped_steps == 3
    for part in (
        "3 optimizer steps in a row were skipped with the loss scale at its floor (1)",
        "The last loss was nan",
        "Gradients are not finite in 5 of 6 parameters: 0.weight (120 of 120 elements)",
        "The model's input is not finite already (argument 0): the data is the cause.",
    ):
        assert part in message
    assert all(torch.equal(m, start[n]) for n, m in masters(mw).items())


def test_an_overflowing_layer_is_named():
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(20, 20)
            nn.init.constant_(self.linear.weight, 6e4)

        def forward(self, x):
            return self.linear(x)

    model = nn.Sequential(nn.Linear(6, 20), Big(), nn.Linear(20, 3))
    nn.init.constant_(model[0].bias, 1.0)
    mw = wrap(model, "fp16", loss_scale=LossScale(init=4.0, floor=1.0, patience=2))
    with pytest.raises(TrainingError) as error:
        train(mw, model, range(10))
    message = str(error.value)
    assert mw.loss_scale == 1.0
    assert "In the last forward pass finite inputs became non-finite in: 1.linear (largest |input| " in message
    assert "keep_fp32" in message and "compute in bf16" in message


def test_a_backward_that_overflows_alone_is_told_apart():
    model = make_model()
    mw = wrap(model, "fp16", loss_scale=LossScale.static(2.0**30, patience=2))
    with pytest.raises(TrainingError, match=r"activations of the last forward are finite .* the loss or backward"):
        train(mw, model, range(5))


def test_the_watch_is_gone_after_a_good_step():
    model = make_model()
    mw = wrap(model, loss_scale=LossScale.static(1.0, patience=2))
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    mw.backward(model(torch.full((2, 6), torch.nan)).sum())
    mw.step()
    assert sum(len(m._forward_hooks) for m in model.modules()) > hooks
    train(mw, model, [0])
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_an_fp16_loss_limits_the_scale_to_what_its_gradient_can_hold():
    weight = nn.Parameter(torch.ones(4))
    mw = MasterWeights(nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1), "fp16")
    assert mw.loss_scale == 2.0**16
    mw.backward((weight * 1e-3).sum())
    assert mw.step()
    assert mw.loss_scale == 2.0**15


# -- gradients for others


@pytest.mark.parametrize(("dtype", "master"), MODES)
@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_can_be_read_and_edited_unscaled(dtype, master, micro):
    model, other = make_model(), make_model()
    mw, plain = wrap(model, dtype, master, loss_scale=512.0), wrap(other, dtype, master, loss_scale=512.0)
    for i in range(micro):
        mw.backward(loss_of(model, i))
        plain.backward(loss_of(other, i))
    gradient = mw.gradient(model[0].weight)
    assert gradient.dtype == torch.float32 and gradient.shape == (20, 6)
    reference = make_model()
    sum(loss_of(reference, i) for i in range(micro)).backward()
    torch.testing.assert_close(gradient, reference[0].weight.grad, rtol=0.1, atol=5e-3)
    norm = float(mw.clip_grad_norm(None))
    assert norm == pytest.approx(float(plain.clip_grad_norm(None)), rel=1e-5)
    mw.gradient(model[0].weight).zero_()
    plain.gradient(other[0].weight).zero_()
    assert mw.step() and plain.step()
    assert all(torch.equal(masters(plain)[n], m) for n, m in masters(mw).items())
    assert mw.grad_norm < norm


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pruning_masks_on_half_weights_leave_the_masters_dense(dtype):
    model = make_model()
    mw = wrap(model, dtype)
    names = ["0.weight", "3.weight"]
    masked = MaskedWeights({n: model.get_parameter(n) for n in names})
    masks = {n: torch.rand(model.get_parameter(n).shape[0], 1) > 0.4 for n in names}
    masked.apply(masks)
    masked.dense = {n: masters(mw)[n] for n in names}  # as they were before the weights became half
    masked.follow(mw)
    start = masters(mw)
    for i in range(3):
        mw.backward(loss_of(model, i))
        masked.gradients_ready()
        mw.step()
        masked.take_update()
        masked.apply(masks)
        for n in names:
            expected = masters(mw)[n].to(model.get_parameter(n).dtype) * masks[n]
            assert torch.equal(model.get_parameter(n), expected)
    for n in names:
        dropped = ~masks[n].expand_as(start[n])
        decayed = start[n] * (1 - 1e-4) ** 3
        torch.testing.assert_close(masters(mw)[n][dropped], decayed[dropped])  # dense, only decayed
        assert (masters(mw)[n][~dropped] != decayed[~dropped]).any()
    masked.restore()
    assert torch.equal(model[0].weight, masters(mw)["0.weight"].to(model[0].weight.dtype))


def test_parameters_of_the_optimizer_that_are_not_the_models_train_in_fp32():
    model, scores = make_model(), nn.Parameter(torch.zeros(20))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": [scores], "lr": 0.5}], lr=1e-2)
    mw = MasterWeights(model, optimizer)
    assert scores.dtype == torch.float32
    mw.backward(loss_of(model, 0))
    mw.unscale_gradients()
    scores.grad = torch.full((20,), 2.0)
    assert mw.step()
    torch.testing.assert_close(scores.detach(), torch.full((20,), -0.5))
    assert "optimizer.1.6" in mw.state_dict()["masters"]


def test_a_parameter_group_can_be_added_and_a_layer_unfrozen():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    mw = MasterWeights(model, optimizer)
    train(mw, model, [0, 1])
    before = masters(mw)
    moments = optimizer.state[mw.masters.by_name["3.weight"][1].master]["exp_avg"].clone()
    model[0].requires_grad_(True)
    mw.add_param_group({"params": list(model[0].parameters()), "lr": 1e-3})
    assert all(torch.equal(m, before[n]) for n, m in masters(mw).items())
    assert torch.equal(optimizer.state[mw.masters.by_name["3.weight"][1].master]["exp_avg"], moments)
    train(mw, model, [2])
    steps = {n: int(flat.steps[e.index]) for n, (flat, e) in mw.masters.by_name.items()}
    assert steps == {"0.weight": 1, "0.bias": 1, "1.weight": 3, "1.bias": 3, "3.weight": 3, "3.bias": 3}


# -- resume


def checkpoint(mw, model, tmp_path, how):
    state = mw.state_dict()
    if how == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)
    save_state(state, tmp_path / "state")
    json.loads((tmp_path / "state.json").read_text())
    assert load_file(tmp_path / "state.safetensors")
    return load_state(tmp_path / "state")


@pytest.mark.parametrize("how", ["torch.save", "safetensors and JSON"])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "rmsprop"])
@pytest.mark.parametrize(("dtype", "master"), MODES)
def test_resume_is_bit_identical_also_after_skipped_steps(dtype, master, optimizer, how, tmp_path):
    if (master, optimizer) == ("split", "rmsprop"):
        return
    kind, settings = OPTIMIZERS[optimizer]
    scale = LossScale(init=2.0**20, interval=3, patience=30)

    def start(seed):
        model = make_model(seed)
        return model, wrap(model, dtype, master, kind, settings, loss_scale=scale, keep_fp32=["norms"])

    model, mw = start(0)
    train(mw, model, [0, 1])
    mw.backward(model(torch.full((2, 6), torch.nan)).sum())
    assert not mw.step()
    train(mw, model, [2, 3])
    state = checkpoint(mw, model, tmp_path, how)
    losses = train(mw, model, range(4, 12))

    again, resumed = start(7)
    resumed.load_state_dict(state)
    assert train(resumed, again, range(4, 12)) == losses
    assert all(torch.equal(masters(mw)[n], m) for n, m in masters(resumed).items())
    assert resumed.scaler.state_dict() == mw.scaler.state_dict()
    assert resumed.skipped_steps >= 1


def test_split_and_fp32_masters_read_each_others_state():
    model, other = make_model(0), make_model(1)
    mw, reader = wrap(model, "bf16", "fp32"), wrap(other, "bf16", "split")
    train(mw, model, [0, 1])
    reader.load_state_dict(mw.state_dict())
    assert all(torch.equal(masters(mw)[n], m) for n, m in masters(reader).items())
    mw.load_state_dict(reader.state_dict())
    assert all(torch.equal(masters(reader)[n], m) for n, m in masters(mw).items())


def test_masters_on_an_optimizer_that_trained_before_go_on_from_its_state():
    plain, model = make_model(), make_model()
    reference, optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model))
    for m, o in ((plain, reference), (model, optimizer)):
        for i in range(3):
            loss_of(m, i).backward()
            o.step()
            o.zero_grad()
    mw = MasterWeights(model, optimizer)
    state = optimizer.state_dict()["state"]
    assert all(
        torch.equal(torch.as_tensor(v[k]), torch.as_tensor(state[i][k]))
        for i, v in reference.state_dict()["state"].items()
        for k in v
    )
    train(mw, model, [3])
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}


def test_the_wrapped_optimizers_own_state_is_that_of_torch():
    model, plain = make_model(), make_model()
    mw = wrap(model)
    train(mw, model, [0])
    fresh = torch.optim.AdamW(plain.parameters(), lr=1.0)
    fresh.load_state_dict(mw.optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert {int(s["step"]) for s in fresh.state.values()} == {1}


def test_a_state_without_masters_or_of_another_model_is_refused():
    model = make_model()
    mw = wrap(model)
    with pytest.raises(ResumeError, match="holds no fp32 masters"):
        mw.load_state_dict(torch.optim.AdamW(make_model().parameters()).state_dict())
    other = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ResumeError, match=r"of 6 differ in name or shape"):
        mw.load_state_dict(wrap(other).state_dict())


# -- wrong use


def test_closures_and_unknown_ddp_are_refused():
    model = make_model()
    mw = wrap(model)
    with pytest.raises(UserError, match="takes no closure"):
        mw.step(lambda: None)
    with pytest.raises(UserError, match=r"attach\(\) takes the DistributedDataParallel"):
        mw.attach(model)
