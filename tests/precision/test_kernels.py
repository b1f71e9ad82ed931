"""Every kernel against a float64 reference, against torch.optim, and against itself."""

import itertools
import logging
import math

import pytest
import torch
from kit import kernels
from kit.kernels import CODED, CPU, DTYPES, RULES, WEIGHTS, make_flat, masters, set_gradients, step
from torch import nn

from mptrain.precision import cpp_kernel
from mptrain.precision.cpp_kernel import NativeKernel, build, vector_width
from mptrain.precision.flat import Flat
from mptrain.precision.step import AdamRule, SgdRule, TorchKernel, clip_factor, collect, rule_of

WIDTHS = list(itertools.dropwhile(lambda w: w != vector_width(), cpp_kernel.VECTOR_FLAGS))
KERNELS = ["torch", *WIDTHS]


def make_kernel(name):
    if name == "torch":
        kernel = TorchKernel(CPU)
        kernel.block = 256  # several blocks, and blocks of several parameters
        return kernel
    return NativeKernel(build(name))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_kernel_matches_a_float64_reference(kernel, rule, weights):
    kernels.check_float64_reference(make_kernel(kernel), rule, weights)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", RULES)
def test_kernel_matches_torch_optim_in_fp32(kernel, rule):
    kernels.check_torch_optim(make_kernel(kernel), rule)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", ["fp16", "bf16"])
def test_half_weights_are_the_masters_rounded_to_nearest_even(kernel, weights):
    """Over every sign, exponent and rounding case: lr 0 leaves the masters and rewrites the half weights."""
    dtype = DTYPES[weights]
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = every.view(torch.int32)
    values = torch.cat([(bits + d).view(torch.float32) for d in (0, 1, -1, 0x1000, 0x0FFF, 0x1001, 0x7FFF, 0x8000)])
    values = torch.cat([values, torch.tensor([65519.9, 65520.0, 2.0**-25, 2.0**-24, 3 * 2.0**-25, 1e-45])])
    values = values[values.isfinite()]
    flat = make_flat(weights, [values.shape])
    flat.master[: values.numel()].copy_(values)
    flat.entries[0].parameter.grad = torch.zeros(values.shape, dtype=dtype)
    step(make_kernel(kernel), flat, torch.optim.SGD, {**RULES["sgd"][1], "lr": 0.0, "weight_decay": 0.0})
    actual, expected = flat.entries[0].parameter.detach(), values.to(dtype)
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_split_weights_are_exact_for_every_high_half(kernel):
    high = torch.arange(2**16, dtype=torch.int32) << 16
    values = torch.cat([(high + low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = values[values.isfinite()]
    flat = make_flat("split", [values.shape])
    flat.write_master(flat.entries[0], values)
    flat.entries[0].parameter.grad = torch.zeros(values.shape, dtype=torch.bfloat16)
    step(make_kernel(kernel), flat, torch.optim.SGD, {**RULES["sgd"][1], "lr": 0.0, "weight_decay": 0.0})
    assert torch.equal(masters(flat)[0].view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_norm_matches_float64(kernel, weights):
    kernels.check_norm(make_kernel(kernel), weights)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_norm_is_not_finite_with_one_bad_gradient_anywhere(kernel, weights, bad):
    kernels.check_norm_of_bad_gradients(make_kernel(kernel), weights, bad)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [*WEIGHTS, CODED])
def test_a_step_is_deterministic(kernel, weights):
    made = make_kernel(kernel)
    if weights == CODED and kernel == "torch":
        made.block = 1 << 16
    kernels.check_deterministic(made, weights)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", ["adamw", "adam", "adamw-maximize"])
def test_moments_of_8_bits_are_those_of_the_reference(kernel, rule):
    """The C++ without fused multiply-add gives the very bits."""
    kernels.check_coded_reference(make_kernel(kernel), rule, exact=kernel == "baseline")


@pytest.mark.parametrize("kernel", KERNELS)
def test_moments_of_8_bits_never_make_a_step_longer(kernel):
    kernels.check_small_moments_beside_large_ones(make_kernel(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [*WEIGHTS, CODED])
def test_fp32_gradients_give_what_half_gradients_of_the_same_value_give(kernel, weights):
    kernels.check_fp32_gradients(make_kernel(kernel), weights)


def test_largest_half_gradients_are_finite():
    for kernel in KERNELS:
        flat = make_flat("fp16", [(100_000,)])
        flat.entries[0].parameter.grad = torch.full((100_000,), 65504.0, dtype=torch.float16)
        (run,) = collect(flat)
        assert float(make_kernel(kernel).norm(run)) == pytest.approx(65504.0**2 * 100_000, rel=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("weights", [*WEIGHTS, CODED])
def test_native_results_do_not_depend_on_threads(width, weights, monkeypatch):
    monkeypatch.setattr(cpp_kernel, "ELEMENTS_PER_THREAD", 100)

    def trained(threads):
        torch.set_num_threads(threads)
        kernel, flat = NativeKernel(build(width)), make_flat(weights, [(5, 7), (20_001,), (3,)])
        norms = []
        for seed in range(2):
            set_gradients(flat, seed)
            norms += [kernel.norm(run) for run in collect(flat)]
            step(kernel, flat, *RULES["adamw"])
        return norms, masters(flat)

    try:
        one, three = trained(1), trained(3)
    finally:
        torch.set_num_threads(1)
    assert one[0] == three[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], three[1], strict=True))


def test_runs_part_where_gradients_groups_or_steps_differ():
    parameters = [nn.Parameter(torch.ones(20)) for _ in range(6)]
    groups = [0, 0, 0, 1, 1, None]
    flat = Flat(CPU, torch.bfloat16, [(f"p{i}", p, g) for i, (p, g) in enumerate(zip(parameters, groups))])
    for i in (0, 2, 3, 4, 5):
        parameters[i].grad = torch.ones(20, dtype=torch.bfloat16)
    flat.steps[3] = 1
    names = [[e.name for e in run.entries] for run in collect(flat)]
    assert names == [["p0"], ["p2"], ["p3"], ["p4"]]
    kernel = make_kernel("torch")
    step(kernel, flat, torch.optim.SGD, {**RULES["sgd"][1], "weight_decay": 0.0})
    moved = [bool((p != 1).all()) for p in parameters]
    assert moved == [True, False, True, True, True, False]


def test_gradients_in_another_memory_order_are_read_right():
    base = nn.Parameter(torch.randn(4, 6))
    flat = Flat(CPU, torch.bfloat16, [("p", base, 0)])
    gradient = torch.randn(6, 4).bfloat16()
    base.grad = gradient.t()
    (run,) = collect(flat)
    assert torch.equal(run.gradients[0].view(4, 6), gradient.t())


def test_rule_covers_exactly_the_plain_torch_optimizers():
    p = [nn.Parameter(torch.ones(2))]
    assert rule_of(torch.optim.AdamW(p)) is AdamRule
    assert rule_of(torch.optim.Adam(p)) is AdamRule
    assert rule_of(torch.optim.SGD(p)) is SgdRule
    assert rule_of(torch.optim.AdamW(p, amsgrad=True)) is None
    assert rule_of(torch.optim.RMSprop(p)) is None

    class Mine(torch.optim.AdamW):
        pass

    assert rule_of(Mine(p)) is None


@pytest.mark.parametrize("max_norm", [None, 0.5, 1.0, 100.0, math.inf])
def test_clip_factor_is_that_of_clip_grad_norm(max_norm):
    g = nn.Parameter(torch.zeros(100))
    g.grad = torch.randn(100)
    before = g.grad.clone()
    if max_norm is not None:
        nn.utils.clip_grad_norm_([g], max_norm)
    torch.testing.assert_close(before * clip_factor(float(before.norm()), max_norm), g.grad)


# -- building


def test_a_failing_compiler_falls_back_with_one_log_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    cpp_kernel.native_kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert cpp_kernel.native_kernel() is None
            assert cpp_kernel.native_kernel() is None
    finally:
        cpp_kernel.native_kernel.cache_clear()
    assert len(caplog.records) == 1
    assert "run in torch instead of the compiled kernel" in caplog.text


def test_a_library_that_is_none_is_a_build_error(tmp_path):
    (tmp_path / "x.so").write_text("not a library")
    with pytest.raises(cpp_kernel.BuildError, match="could not be loaded"):
        NativeKernel(tmp_path / "x.so")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", ["fp16", "bf16", "split", "fp32"])
@pytest.mark.parametrize("size", [40_003, 9_000_000], ids=["cached", "streamed"])
def test_sync_rounds_every_value_as_torch_does(kernel, weights, size, monkeypatch):
    monkeypatch.setattr(cpp_kernel, "ELEMENTS_PER_THREAD", 10_000)
    flat = make_flat(weights, [(size,)])
    if flat.master is not None:
        generator = torch.Generator().manual_seed(2)
        bits = torch.randint(-(2**31), 2**31, (flat.numel,), generator=generator, dtype=torch.int32)
        flat.master.copy_(bits.view(torch.float32))  # every exponent, subnormals, infinities and NaN
        flat.master[:4] = torch.tensor([65519.9, 65520.0, 2.0**-25, 1 + 2.0**-8])
    expected = None if flat.half is None else flat.half.clone() if flat.master is None else flat.master.to(flat.dtype)
    torch.set_num_threads(3)
    try:
        make_kernel(kernel).sync(flat)
    finally:
        torch.set_num_threads(1)
    if expected is not None:
        assert torch.equal(flat.half.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(flat.half[numbers], expected[numbers])
