"""The loss scale against torch's GradScaler, and its own rules; split masters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.amp import GradScaler

from mptrain.core.errors import UserError
from mptrain.precision.policy import LossScale
from mptrain.precision.scaler import LossScaler
from mptrain.precision.split import join, split


def scales(settings, pattern):
    scaler = LossScaler(settings)
    seen = []
    for finite in pattern:
        scaler.update(finite)
        seen.append(scaler.scale)
    return seen


@given(st.lists(st.booleans(), max_size=60))
def test_scale_moves_as_grad_scaler_moves_it(pattern):
    torch_scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    torch_scaler.scale(torch.ones(()))
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    expected = []
    for finite in pattern:
        parameter.grad = torch.ones(1) if finite else torch.full((1,), torch.inf)
        torch_scaler.step(optimizer)
        torch_scaler.update()
        expected.append(torch_scaler.get_scale())
    settings = LossScale(init=2.0**10, interval=3, floor=2.0**-60, ceiling=2.0**60)
    assert scales(settings, pattern) == expected


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 4))
def test_scale_stays_between_floor_and_ceiling(pattern, hysteresis):
    settings = LossScale(init=4.0, interval=2, floor=1.0, ceiling=16.0, hysteresis=hysteresis)
    assert all(1.0 <= s <= 16.0 for s in scales(settings, pattern))


def test_forced_overflows_from_2_to_the_24_end_at_the_floor_not_at_zero():
    settings = LossScale(init=2.0**24, floor=2.0, patience=1000)
    assert scales(settings, [False] * 200)[-1] == 2.0


def test_hysteresis_tolerates_overflows_until_the_scale_has_grown_again():
    settings = LossScale(init=8.0, interval=2, hysteresis=3)
    assert scales(settings, [False, False, False, False]) == [8.0, 8.0, 4.0, 2.0]
    assert scales(settings, [False, False, True, True, False, False, False]) == [8.0, 8.0, 8.0, 16.0, 16.0, 16.0, 8.0]


def test_a_static_scale_never_moves_but_counts():
    scaler = LossScaler(LossScale.static(128.0, patience=3))
    for finite in (True, False, False, True, False, False):
        scaler.update(finite)
    assert (scaler.scale, scaler.skipped_steps, scaler.exhausted, scaler.last_chance) == (128.0, 4, False, True)
    scaler.update(False)
    assert scaler.exhausted


def test_overflows_above_the_floor_do_not_exhaust():
    scaler = LossScaler(LossScale(init=2.0**10, floor=1.0, patience=2))
    for _ in range(10):
        scaler.update(False)
    assert (scaler.scale, scaler.exhausted) == (1.0, False)
    scaler.update(False)
    scaler.update(False)
    assert scaler.exhausted


def test_state_survives():
    scaler = LossScaler(LossScale(init=64.0, interval=5, hysteresis=2))
    for finite in (True, False, True, False, False, True):
        scaler.update(finite)
    other = LossScaler(scaler.settings)
    other.load_state_dict(scaler.state_dict())
    for finite in (True, True, True, True, False, False):
        scaler.update(finite)
        other.update(finite)
    assert vars(other) == vars(scaler)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"floor": 0.0}, "floor"),
        ({"init": 2.0**25}, "init"),
        ({"init": 0.5}, "init"),
        ({"ceiling": 0.5}, "ceiling"),
        ({"growth": 1.0}, "growth"),
        ({"backoff": 1.0}, "backoff"),
        ({"interval": 0}, "interval"),
        ({"hysteresis": 0}, "hysteresis"),
        ({"patience": 0}, "patience"),
        ({"init": "4"}, "init"),
        ({"ceiling": math.inf}, "ceiling"),
        ({"interval": 2.5}, "interval"),
        ({"patience": None}, "patience"),
    ],
)
def test_wrong_settings_are_named(settings, field):
    with pytest.raises(UserError, match=f"loss_scale.{field} must be .* got"):
        LossScale(**settings)


def test_what_a_user_may_write():
    assert LossScale.of(None, "fp16") == LossScale.of("dynamic", "bf16") == LossScale()
    assert LossScale.of(None, "bf16") == LossScale.static(1.0)
    assert LossScale.of(512, "fp16") == LossScale.static(512.0)
    for wrong in (0, -1.0, "static", True, math.inf, math.nan):
        with pytest.raises(UserError, match="must be 'dynamic', a positive number or a LossScale"):
            LossScale.of(wrong, "fp16")


# -- split


def every_float(count=1 << 20):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = [0, -(2**31), 0x7F800000, -0x800000, 0x7F7FFFFF, 0x00000001, 0x007FFFFF, 0x7FFFFFFF, 0x7F800001, -1]
    bits[: len(special)] = torch.tensor(special, dtype=torch.int32)
    return bits.view(torch.float32)


def test_split_and_join_give_every_number_back_bit_for_bit():
    x = every_float()
    high, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split(x, high, low)
    nan = x.isnan()
    assert torch.equal(join(high, low)[~nan].view(torch.int32), x[~nan].view(torch.int32))
    assert join(high, low)[nan].isnan().all()
    assert high[nan].isnan().all()  # the compute weight shows it too


def test_the_high_half_is_as_near_as_rounding_to_nearest_even():
    x = every_float()
    x = x[x.isfinite() & x.bfloat16().isfinite()]
    high, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split(x, high, low)
    error, nearest = (high.double() - x.double()).abs(), (x.bfloat16().double() - x.double()).abs()
    assert torch.equal(error, nearest)
