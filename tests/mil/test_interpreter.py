"""The interpreter against torch: single operations, rounding, compressed constants, shapes, unknown operations."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from kit.mil import program, save

from mptrain.core.errors import ExportError, UserError
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.mil.constants import blockwise_shift_scale, lut_to_dense
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import OPERATIONS, Interpreter
from mptrain.mil.layout import slice_by_index
from mptrain.mil.math import MATH
from mptrain.mil.padded import Padded
from mptrain.mil.program import read_program

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).numpy()
IMAGE = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(2))
KERNEL = torch.randn(6, 3, 3, 2, generator=torch.Generator().manual_seed(3)).numpy()


def chain(x):
    """Many operations in one program, each an output, so that one conversion tests them all."""
    positive = mb.add(x=mb.abs(x=x), y=0.5)
    return (
        mb.linear(x=x, weight=W, bias=W[:, 0]),
        mb.layer_norm(x=x, axes=[-1], gamma=W[0], beta=W[1], epsilon=1e-3),
        mb.softmax(x=x, axis=1),
        mb.gelu(x=x, mode="EXACT"),
        mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        mb.silu(x=x),
        mb.softplus(x=x),
        mb.rsqrt(x=positive, epsilon=1e-3),
        mb.log(x=positive, epsilon=1e-3),
        mb.clip(x=x, alpha=-0.5, beta=0.25),
        mb.reduce_mean(x=x, axes=[0, 2], keep_dims=True),
        mb.reduce_log_sum_exp(x=x, axes=[1], keep_dims=False),
        mb.reduce_argmax(x=x, axis=2, keep_dims=False),
        mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        mb.concat(values=[x, mb.mul(x=x, y=2.0)], axis=1),
        mb.stack(values=[x, positive], axis=1),
        mb.split(x=x, split_sizes=[3, 5], axis=2)[1],
        mb.transpose(x=x, perm=[2, 0, 1]),
        mb.slice_by_index(x=x, begin=[0, 2, 6], end=[2, 0, 0], stride=[1, -1, -2], end_mask=[False, True, True]),
        mb.slice_by_size(x=x, begin=[0, 1, 2], size=[2, 2, -1]),
        mb.pad(x=x, pad=[1, 2, 3, 4], mode="constant", constant_val=7.0),
        mb.tile(x=x, reps=[1, 2, 3]),
        mb.gather(x=x, indices=np.array([2, 0]), axis=1),
        mb.gather_along_axis(x=x, indices=np.zeros((2, 3, 8), np.int32) + 1, axis=1),
        mb.gather_nd(x=x, indices=np.array([[1, 2], [0, 0]], np.int32)),
        mb.topk(x=x, k=3, axis=2)[0],
        mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=positive),
        mb.scaled_dot_product_attention(query=x, key=positive, value=x),
        mb.matmul(x=x, y=positive, transpose_x=True, transpose_y=False),
        mb.band_part(x=x, lower=0, upper=-1),
        mb.reverse(x=x, axes=[1]),
        mb.einsum(
            values=(mb.expand_dims(x=x, axes=[0]), mb.transpose(x=mb.expand_dims(x=x, axes=[0]), perm=[0, 3, 2, 1])),
            equation="abcd,adce->abce",
        ),
    )  # fmt: skip


def expected(x):
    p = x.abs() + 0.5
    w = torch.from_numpy(W)
    return [
        F.linear(x, w, w[:, 0]),
        F.layer_norm(x, (8,), w[0], w[1], 1e-3),
        x.softmax(1),
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        F.silu(x),
        F.softplus(x),
        (p + 1e-3).rsqrt(),
        (p + 1e-3).log(),
        x.clamp(-0.5, 0.25),
        x.mean((0, 2), keepdim=True),
        x.logsumexp(1),
        x.argmax(2),
        x.flip(1).cumsum(1).flip(1) - x,
        torch.cat([x, 2 * x], 1),
        torch.stack([x, p], 1),
        x[..., 3:],
        x.permute(2, 0, 1),
        torch.from_numpy(x.numpy()[:, ::-1, 6::-2].copy()),
        x[:, 1:, 2:],
        F.pad(x, (3, 4, 1, 2), value=7.0),
        x.repeat(1, 2, 3),
        x[:, [2, 0]],
        x[:, 1:2].expand(2, 3, 8),
        x[[1, 0], [2, 0]],
        x.topk(3, 2)[0],
        torch.where(x > 0, x, p),
        F.scaled_dot_product_attention(x, p, x),
        x.transpose(1, 2) @ p,
        x.triu(),
        x.flip(1),
        torch.einsum("abcd,adce->abce", x[None], x[None].permute(0, 3, 2, 1)),
    ]


def test_operations_of_a_saved_program_are_those_of_torch(tmp_path):
    runner = Interpreter(save(program(X.shape, chain), tmp_path))
    found = list(runner({"x": X}).values())
    wanted = expected(X)
    assert len(found) == len(wanted)
    for index, (ours, theirs) in enumerate(zip(found, wanted)):
        assert ours.shape == tuple(theirs.shape), index
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=2e-6, err_msg=str(index))


def test_convolutions_and_pools_are_those_of_torch(tmp_path):
    def build(x):
        pad = {"pad_type": "custom", "pad": [1, 2, 0, 1]}
        return (
            mb.conv(x=x, weight=KERNEL, strides=[2, 1], bias=KERNEL[:, 0, 0, 0], **pad),
            mb.conv(x=x, weight=KERNEL, pad_type="same", strides=[1, 1]),
            mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 1], pad_type="valid"),
            mb.avg_pool(x=x, kernel_sizes=[2, 2], strides=[1, 1], exclude_padding_from_average=True, **pad),
        )

    found = list(Interpreter(save(program(IMAGE.shape, build), tmp_path))({"x": IMAGE}).values())
    kernel, padded = torch.from_numpy(KERNEL), F.pad(IMAGE, (0, 1, 1, 2))
    ones = F.avg_pool2d(F.pad(torch.ones_like(IMAGE), (0, 1, 1, 2)), 2, 1)
    wanted = [
        F.conv2d(padded, kernel, kernel[:, 0, 0, 0], (2, 1)),
        F.conv2d(F.pad(IMAGE, (0, 1, 1, 1)), kernel),
        F.max_pool2d(IMAGE, (2, 3), (2, 1)),
        F.avg_pool2d(padded, 2, 1) / ones,
    ]
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_float16_is_rounded_once_per_operation(tmp_path):
    def build(x):
        return mb.sub(x=mb.mul(x=mb.add(x=x, y=0.1), y=300.0), y=1.0)

    def half(value):
        return value.half().float()

    package = save(program((5,), build), tmp_path)
    x = {"x": torch.tensor([0.123456, 1.0, 250.0, 1e-6, -3.3])}
    wanted = half(half(half(half(x["x"]) + half(torch.tensor(0.1))) * 300) - 1)
    emulated = Interpreter(package, "fp16")
    (found,) = emulated(x).values()
    assert np.array_equal(found, wanted.numpy()) and np.isinf(found[2])
    (exact,) = Interpreter(package)(x).values()
    np.testing.assert_allclose(exact, (x["x"] + 0.1) * 300 - 1, rtol=1e-6)
    names = [op.name for op in emulated.program.main.operations]
    (kept,) = Interpreter(package, "fp16", keep_fp32=names)(x).values()
    assert np.array_equal(kept, exact)
    rows = {row.type: row for row in Interpreter(package).records([x])}
    assert rows["mul"].largest == pytest.approx(75030, rel=1e-4) and rows["mul"].infinite == 0
    assert next(r for r in emulated.records([x]) if r.type == "mul").infinite == 1


def test_a_float16_package_is_rounded_where_it_says_so(tmp_path):
    package = save(program((4,), lambda x: mb.exp(x=mb.mul(x=x, y=1.001))), tmp_path, ct.precision.FLOAT16)
    x = torch.tensor([0.1, 2.0, 11.0, 12.0])
    (found,) = Interpreter(package)({"x": x}).values()
    scale = torch.tensor(1.001).half().float()
    assert np.array_equal(found, (x.half().float() * scale).half().float().exp().half().float().numpy())
    (exact,) = Interpreter(package, "fp32")({"x": x}).values()
    assert np.isfinite(exact).all() and np.isinf(found[3])
    assert facts(read_program(package))["inference_precision"] == "f16"


def test_compressed_constants_decode_as_coremltools_decodes_them():
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
        constexpr_blockwise_shift_scale,
        constexpr_lut_to_dense,
    )

    draw = np.random.default_rng(0)
    data, offset = draw.integers(0, 16, (6, 8)).astype(np.int8), draw.integers(0, 16, (3, 2)).astype(np.int8)
    scale = draw.normal(size=(3, 2)).astype(np.float32)
    ours = blockwise_shift_scale(*(torch.from_numpy(a) for a in (data, scale, offset)))
    np.testing.assert_array_equal(ours, constexpr_blockwise_shift_scale.decompress(data, scale, offset))
    for vector in (1, 2):
        lut, indices = draw.normal(size=(3, 1, 4, vector)).astype(np.float32), draw.integers(0, 4, (6, 8))
        axis = 0 if vector > 1 else None
        ours = lut_to_dense(torch.from_numpy(indices), torch.from_numpy(lut), vector_axis=axis)
        np.testing.assert_array_equal(ours, constexpr_lut_to_dense.decompress(indices.astype(np.uint8), lut, axis))


def test_slices_are_numpys():
    x = torch.arange(24).reshape(2, 3, 4)
    found = slice_by_index(
        x, torch.tensor([1, -1, 0]), torch.tensor([0, 0, -1]), squeeze_mask=torch.tensor([True, False, False]),
        end_mask=torch.tensor([False, True, False]),
    )  # fmt: skip
    assert torch.equal(found, x[1, -1:, 0:-1])


def test_unknown_operations_are_all_listed_at_once(tmp_path, monkeypatch):
    package = save(program((4,), lambda x: mb.tanh(x=mb.exp(x=mb.exp(x=x)))), tmp_path)
    for name in ("exp", "tanh"):
        monkeypatch.delitem(OPERATIONS, name)
    with pytest.raises(ExportError, match=r"exp \(2×\), tanh \(1×\)"):
        Interpreter(package)
    assert "exp" in MATH


def test_shapes_are_checked_and_fixed_packages_take_any_batch(tmp_path):
    def pooled(x):
        return mb.reduce_sum(x=x, axes=[1], keep_dims=False), mb.mul(x=x, y=2.0)

    fixed = save(program((2, 4), pooled), tmp_path)
    with pytest.raises(UserError, match=r"shape \[3, 4\].*x: float32 \[2, 4\]"):
        Interpreter(fixed)({"x": torch.zeros(3, 4)})
    with pytest.raises(UserError, match="lacks \\['x'\\]"):
        Interpreter(fixed)({"y": torch.zeros(3, 4)})
    x = torch.randn(5, 4)
    outputs = (Port(name, axes) for name, axes in zip(Interpreter(fixed).outputs, ((BATCH,), (BATCH, 4))))
    signature = Signature((Port("x", (BATCH, 4)),), tuple(outputs))
    total, double = Padded(Interpreter(fixed), signature)({"x": x}).values()
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(double, 2 * x)


def test_a_file_that_is_no_package_is_refused(tmp_path):
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(UserError, match=r"x\.mlpackage: not a Core ML package"):
        Interpreter(tmp_path / "x.mlpackage")


def test_states_live_from_call_to_call(tmp_path):
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(2, 3))

        def forward(self, x):
            self.total.add_(x)
            return self.total * 2

    exported = torch.export.export(Sum(), (torch.zeros(2, 3),), strict=False).run_decompositions({})
    runner = Interpreter(save(exported, tmp_path))
    assert runner.program.states["total"].shape == (2, 3)
    x = {"x": torch.full((2, 3), 0.1)}
    steps = [next(iter(runner(x).values())) for _ in range(3)]
    step = torch.tensor(0.1)
    total = torch.zeros(())
    for found in steps:
        total = (total + step).half().float()  # Core ML keeps states in float16
        np.testing.assert_allclose(found, 2 * total.expand(2, 3), rtol=1e-3)
    np.testing.assert_array_equal(runner.state["total"], total.expand(2, 3))
    runner.reset()
    np.testing.assert_array_equal(next(iter(runner(x).values())), steps[0])
