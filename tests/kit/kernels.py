"""What every kernel of precision/ must do: the textbook update in float64, torch.optim's, norms, the same each time.

Each check takes a kernel, so that the Triton kernel meets them in a process of its own.
"""

import math

import pytest
import torch
from torch import nn

from mptrain.precision import moments8
from mptrain.precision.flat import Flat
from mptrain.precision.split import join
from mptrain.precision.step import AdamRule, SgdRule, collect

CPU = torch.device("cpu")
SHAPES = [(3, 5), (1,), (), (64,), (7, 11, 2), (1000,), (333,)]
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
SGD = {"lr": 1e-1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1, "maximize": False}
RULES = {
    "adamw": (torch.optim.AdamW, ADAM),
    "adam": (torch.optim.Adam, ADAM),
    "adamw-maximize": (torch.optim.AdamW, {**ADAM, "maximize": True, "weight_decay": 0.0}),
    "sgd": (torch.optim.SGD, {**SGD, "momentum": 0.0}),
    "momentum": (torch.optim.SGD, SGD),
    "dampening": (torch.optim.SGD, {**SGD, "dampening": 0.3, "maximize": True}),
    "nesterov": (torch.optim.SGD, {**SGD, "nesterov": True}),
}
WEIGHTS = ["fp16", "bf16", "split", "fp32"]
CODED = "int8"  # split, with moments of 8 bits; Adam's alone
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "split": torch.bfloat16, "fp32": torch.float32}
DTYPES |= {CODED: torch.bfloat16}


def make_flat(weights, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    members = [(f"p{i}", p, 0) for i, p in enumerate(parameters)]
    return Flat(CPU, DTYPES[weights], members, split=weights in ("split", CODED), coded=weights == CODED)


def set_gradients(flat, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for entry in flat.entries:
        entry.parameter.grad = (torch.randn(entry.shape, generator=generator) * scale).to(entry.parameter.dtype)


def step(kernel, flat, kind, settings, factor=1.0):
    rule = AdamRule if issubclass(kind, torch.optim.Adam) else SgdRule
    group = {**settings, "decoupled_weight_decay": kind is torch.optim.AdamW}
    for run in collect(flat):
        kernel.update(run, rule.of(group, run.step + 1), factor)
        flat.steps[run.entries[0].index : run.entries[-1].index + 1] += 1


def reference(kind, settings, parameters, gradients, factor):
    """The textbook update in float64; gradients: one list of tensors for each step."""
    s = settings
    parameters = [p.double() for p in parameters]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for t, step_gradients in enumerate(gradients, 1):
        for i, g in enumerate(step_gradients):
            p, g = parameters[i], g.double() * (-factor if s["maximize"] else factor)
            if kind is torch.optim.AdamW:
                p = p * (1 - s["lr"] * s["weight_decay"])
            else:
                g = g + s["weight_decay"] * p
            if kind is torch.optim.SGD:
                share = 1 if t == 1 else 1 - s["dampening"]
                first[i] = s["momentum"] * first[i] + share * g
                p = p - s["lr"] * (g + s["momentum"] * first[i] if s["nesterov"] else first[i])
            else:
                b1, b2 = s["betas"]
                first[i] = b1 * first[i] + (1 - b1) * g
                second[i] = b2 * second[i] + (1 - b2) * g**2
                root = (second[i] / (1 - b2**t)).sqrt()
                p = p - s["lr"] * (first[i] / (1 - b1**t)) / (root + s["eps"])
            parameters[i] = p
    return parameters, first, second


def masters(flat):
    return [flat.read_master(e).clone() for e in flat.entries]


def check_float64_reference(kernel, rule, weights):
    kind, settings = RULES[rule]
    flat, factor = make_flat(weights), 0.37
    start, gradients = masters(flat), []
    for seed in range(4):
        set_gradients(flat, seed)
        gradients.append([e.parameter.grad.clone() for e in flat.entries])
        step(kernel, flat, kind, settings, factor)
    parameters, first, second = reference(kind, settings, start, gradients, factor)
    names = flat.states
    assert set(names) <= {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    for i, entry in enumerate(flat.entries):
        torch.testing.assert_close(masters(flat)[i].double(), parameters[i], rtol=2e-6, atol=5e-7)
        for name, expected in (("exp_avg", first), ("momentum_buffer", first), ("exp_avg_sq", second)):
            if name in names:
                actual = flat.view(names[name], entry).double()
                torch.testing.assert_close(actual, expected[i], rtol=2e-6, atol=5e-7)


def check_torch_optim(kernel, rule):
    kind, settings = RULES[rule]
    flat = make_flat("fp32")
    plain = [nn.Parameter(p) for p in masters(flat)]
    optimizer = kind(plain, **settings)
    for seed in range(5):
        set_gradients(flat, seed)
        for p, e in zip(plain, flat.entries, strict=True):
            p.grad = e.parameter.grad.clone()
        optimizer.step()
        step(kernel, flat, kind, settings)
    for p, m in zip(plain, masters(flat), strict=True):
        torch.testing.assert_close(m, p.detach(), rtol=2e-6, atol=5e-7)


def coded_reference(flat, settings, step, factor):
    """The step of moments8.py, an fp32 operation at a time: what masters and the four buffers then are."""
    rule = AdamRule.of(settings, step)
    l2, decay, take1, beta2, take2, size, root_bias, eps = rule.constants
    grad = torch.zeros(flat.trained)
    for entry in flat.entries:
        flat.view(grad, entry).copy_(entry.parameter.grad)
    p = join(flat.half, flat.low)
    first, second = moments8.FIRST, moments8.SECOND
    buffers = {name: flat.state(name).clone() for name in moments8.BUFFERS}
    m, v = (moments8.decode(n, buffers[n], buffers[moments8.EXPONENTS[n]]) for n in (first, second))
    g = grad * (-factor if rule.maximize else factor) + l2 * p
    m = m + take1 * (g - m)
    v = beta2 * v + take2 * (g * g)
    p = decay * p - size * (m / (root_bias * v.double().sqrt().float() + eps))
    for name, values in ((first, m), (second, v)):
        threshold = moments8.thresholds(name, 0, flat.trained, step, CPU)
        buffers[name], buffers[moments8.EXPONENTS[name]] = moments8.encode(name, values, threshold)
    return p, buffers


def check_coded_reference(kernel, rule, exact):
    """exact: bit for bit; otherwise a sum may be rounded elsewhere, and so a moment to the code beside."""
    kind, settings = RULES[rule]
    group = {**settings, "decoupled_weight_decay": kind is torch.optim.AdamW}
    flat = make_flat(CODED, [*SHAPES, (4000,), (9, 64)])
    apart = total = 0
    for seed in range(6):
        set_gradients(flat, seed, scale=10.0 ** (seed % 3))
        for entry in flat.entries[::2]:
            entry.parameter.grad[...] *= torch.logspace(-6, 0, entry.numel).view(entry.shape).bfloat16()
        p, buffers = coded_reference(flat, group, seed + 1, 0.37)
        step(kernel, flat, kind, settings, 0.37)
        found = join(flat.half, flat.low)
        if exact:
            assert torch.equal(found.view(torch.int32), p.view(torch.int32))
        torch.testing.assert_close(found, p, rtol=2e-6, atol=5e-7)
        for name, expected in buffers.items():
            off = (flat.state(name).int() - expected.int()).abs()
            assert off.max() <= (0 if exact else 1) and flat.state(name).int().abs().max() > 8
            apart, total = apart + int(off.sum()), total + off.numel()
    assert apart <= 1e-3 * total


def check_small_moments_beside_large_ones(kernel):
    """Gradients of 1e6 and of 1e-6 in one block: what moments8.py says of how far a step may be."""
    flats = [make_flat(weights, [(256,)]) for weights in (CODED, "split")]
    settings = {**ADAM, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    large = torch.zeros(256, dtype=torch.bool)
    large[::37] = True
    furthest = torch.zeros(2, 256)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(256, generator=generator) * torch.where(large, 1e6, 10.0 ** (-(seed % 7)))
        if seed > 30:
            gradient[large] = 0.0
        for which, flat in enumerate(flats):
            before = masters(flat)[0]
            flat.entries[0].parameter.grad = gradient.bfloat16()
            step(kernel, flat, torch.optim.AdamW, settings)
            furthest[which] = furthest[which].maximum((masters(flat)[0] - before).abs())
    assert furthest[0].isfinite().all() and (furthest[0] <= 1.1 * furthest[1] + furthest[1][large].max() / 8).all()
    assert (furthest[0][large] > 0.5 * furthest[1][large]).all()


def check_norm(kernel, weights):
    flat = make_flat(weights, [*SHAPES, (40_000,), (4096,), (4097,)])
    set_gradients(flat, 3, scale=1e-2)
    (run,) = collect(flat)
    exact = sum(float(e.parameter.grad.double().square().sum()) for e in flat.entries)
    assert float(kernel.norm(run)) == pytest.approx(exact, rel=1e-6)


def check_norm_of_bad_gradients(kernel, weights, bad):
    flat = make_flat(weights)
    for entry, place in [(0, 14), (1, 0), (5, 999), (5, 992), (6, 332)]:
        set_gradients(flat, 0)
        flat.entries[entry].parameter.grad.view(-1)[place] = bad
        assert not math.isfinite(sum(float(kernel.norm(run)) for run in collect(flat)))


def check_deterministic(kernel, weights):
    def trained():
        flat = make_flat(weights, [(70_000,), (3, 5)])
        for seed in range(2):
            set_gradients(flat, seed)
            step(kernel, flat, *RULES["adamw"])
        return masters(flat)

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


def check_fp32_gradients(kernel, weights):
    half, summed = make_flat(weights), make_flat(weights)
    set_gradients(half, 0)
    for e, s in zip(half.entries, summed.entries, strict=True):
        summed.view(summed.gradients(), s).copy_(e.parameter.grad)
        s.accumulated = True
    for flat in (half, summed):
        step(kernel, flat, *RULES["adamw"])
    assert all(torch.equal(a, b) for a, b in zip(masters(half), masters(summed), strict=True))
