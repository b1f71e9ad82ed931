import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec
from nncf.torch.quantization.reference import torch_executor

from mptrain.compress.quantize import fake_quant
from mptrain.compress.quantize.fake_quant import FakeQuantizer, fake_quantize
from mptrain.core import native
from mptrain.core.errors import ModelError


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fake_quant, "_kernels", lambda: None)
    else:
        assert fake_quant._kernels() is not None, "these tests need a C compiler"
    return request.param


def quantizer(bits=8, symmetric=True, signed=True, narrow=False, shape=(1,), **values):
    made = FakeQuantizer(bits=bits, symmetric=symmetric, signed=signed, narrow=narrow, shape=shape)
    for name, value in values.items():
        getattr(made, name).data.copy_(torch.as_tensor(value))
    return made


@pytest.mark.parametrize("shape", [(1,), (7, 1), (7, 1, 1)])
@pytest.mark.parametrize("levels", [(-127, 127), (-8, 7), (0, 255)])
def test_forward_has_the_bits_of_torch(path, shape, levels):
    x = 3 * torch.randn(*[7, 5001, 3][: max(len(shape), 2)])
    step = 0.01 + torch.rand(shape) / 20
    zero = torch.randint(levels[0], levels[1], shape).float()
    y = fake_quantize(x, step, zero, *levels)
    if len(shape) == 1:
        expected = torch.fake_quantize_per_tensor_affine(x, step, zero.int(), *levels)
    else:
        expected = torch.fake_quantize_per_channel_affine(x, step.flatten(), zero.int().flatten(), 0, *levels)
    assert torch.equal(y, expected)
    assert y.unique().numel() > 10


def test_a_channel_axis_in_the_middle_and_strides(path):
    x, step = torch.randn(2, 5, 40, 6), 0.01 + torch.rand(1, 5, 1, 1) / 10
    x = x.transpose(2, 3)
    y = fake_quantize(x, step, torch.zeros_like(step), -127, 127)
    assert torch.equal(y, torch.fake_quantize_per_channel_affine(x, step.flatten(), torch.zeros(5).int(), 1, -127, 127))


@pytest.mark.parametrize("channels", [1, 6])
def test_gradients_of_a_symmetric_quantizer_are_torchs_learned_ones(path, channels):
    shape = (1,) if channels == 1 else (channels, 1)
    x = torch.randn(6, 20000)
    dy = torch.randn_like(x)
    ours = quantizer(shape=shape, narrow=True, scale=1 + torch.rand(shape))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(mine).backward(dy)
    step = (ours.scale.detach().flatten() / 127).requires_grad_()
    zero = torch.zeros_like(step).requires_grad_()
    if channels == 1:
        expected = torch._fake_quantize_learnable_per_tensor_affine(theirs, step, zero, -127, 127, 1.0)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(theirs, step, zero, 0, -127, 127, 1.0)
    expected.backward(dy)
    assert torch.equal(mine.grad, theirs.grad)
    torch.testing.assert_close(ours.scale.grad.flatten() * 127, step.grad, rtol=1e-4, atol=2e-3)
    assert (mine.grad == 0).any() and (mine.grad != 0).any()


def nncf_quantizer(low, width):
    spec = PTQuantizerSpec(8, QuantizationScheme.ASYMMETRIC, None, False, False, (1,), False)
    made = AsymmetricQuantizer(spec)
    made.input_low.data.fill_(low)
    made.input_range.data.fill_(width)
    return made


@pytest.mark.parametrize(("low", "width"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, 1.0), (-0.4, 4.0), (-5.0, 7.7)])
def test_an_asymmetric_quantizer_is_nncfs(path, low, width, monkeypatch):
    namespace = type("Reference", (), {n: staticmethod(f) for n, f in _reference().items()})
    monkeypatch.setattr("nncf.torch.quantization.extensions.QuantizedFunctionsCPU._loaded_namespace", namespace)
    ours, theirs = quantizer(symmetric=False, signed=False, low=low, range=width), nncf_quantizer(low, width)
    step = ours.grid()[0].item()
    x = 4 * torch.randn(20000)
    edges = torch.tensor([min(low, 0.0), max(low + width, 0.0)])
    x = x[(x[:, None] - edges).abs().amin(1) > 2 * step]  # which side the half step at an end belongs to differs
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(mine), theirs(other)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    dy = torch.randn_like(x)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(mine.grad, other.grad)
    torch.testing.assert_close(ours.low.grad, theirs.input_low.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.range.grad, theirs._input_range_param_storage.grad, rtol=1e-3, atol=1e-2)


def _reference():
    return {
        "Quantize_forward": torch_executor.forward,
        "Quantize_backward": lambda *arguments: torch_executor.backward(*arguments[:7]),
    }


@given(st.floats(-20, 20), st.floats(0.001, 30), st.sampled_from([4, 8]))
@example(-0.03125, 1.0, 4)  # less than half a step below zero: not worth a level
def test_zero_is_a_level_and_the_range_is_covered(low, width, bits):
    made = quantizer(bits=bits, symmetric=False, signed=False, low=low, range=width)
    step, zero = (t.item() for t in made.grid())
    qmin, qmax = made.levels
    assert made(torch.zeros(3)).abs().max() == 0
    assert zero == round(zero) and qmin <= zero <= qmax
    ends = torch.tensor([low, low + width], dtype=torch.float32)
    assert (made(ends) - ends).abs().max() <= 0.51 * step
    span = max(low + width, 0) - min(low, 0)
    assert (span - 0.51 * step) * (1 - 1e-5) <= step * qmax <= 1.5 * span * (1 + 1e-5)


def test_compiled_and_torch_agree(monkeypatch):
    x, dy = torch.randn(64, 700), torch.randn(64, 700)
    results = []
    for kernels in (fake_quant._kernels(), None):
        monkeypatch.setattr(fake_quant, "_kernels", lambda kernels=kernels: kernels)
        made = quantizer(bits=4, shape=(64, 1), scale=torch.linspace(0.5, 2, 64)[:, None])
        leaf = x.clone().requires_grad_()
        y = made(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, made.scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_no_bit():
    x, dy = torch.randn(3, 100_001), torch.randn(3, 100_001)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made = quantizer(scale=2.0)
        leaf = x.clone().requires_grad_()
        made(leaf).backward(dy)
        results.append((made.scale.grad, leaf.grad))
    assert all(torch.equal(r[0], results[0][0]) and torch.equal(r[1], results[0][1]) for r in results)


def test_nan_goes_through(path):
    assert quantizer()(torch.tensor([0.5, float("nan")])).isnan().tolist() == [False, True]


def test_half_precision_inputs(path):
    x = torch.randn(100).bfloat16().requires_grad_()
    made = quantizer(scale=2.0)
    y = made(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, made(x.detach().float()).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and made.scale.grad.dtype == torch.float32


def test_an_empty_tensor(path):
    assert quantizer()(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1,), (5, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_frozen_has_the_same_bits(shape, symmetric):
    made = quantizer(symmetric=symmetric, signed=symmetric, narrow=symmetric, shape=shape)
    for parameter in made.parameters():
        parameter.data.uniform_(-1, 2)
    x = 3 * torch.randn(5, 1000)
    assert torch.equal(made(x), made.frozen()(x))


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"bits": 8}, (-128, 127)),
        ({"bits": 8, "narrow": True}, (-127, 127)),
        ({"bits": 4, "narrow": True}, (-7, 7)),
        ({"bits": 8, "signed": False}, (0, 255)),
        ({"bits": 4, "symmetric": False, "signed": False}, (0, 15)),
    ],
)
def test_levels(options, levels):
    assert quantizer(**options).levels == levels


# -- the compiler


def test_without_a_compiler_it_runs_in_torch_and_says_so_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native.load.cache_clear()
    try:
        assert fake_quant._kernels() is None and fake_quant._kernels() is None
    finally:
        native.load.cache_clear()
    assert len(caplog.records) == 1 and "runs on torch operations" in caplog.text


@pytest.mark.parametrize("given", [(4, 7), (7,), (3, 5, 4)])
def test_a_tensor_of_another_shape_is_refused(path, given):
    """The kernels would write beyond their sums, and torch would broadcast [1, n] to as many rows as there are ranges:
    a model to which adapters were added hands a layer's quantizer the weights of another."""
    made = quantizer(shape=(7, 1))
    with pytest.raises(ModelError, match=r"a quantizer has ranges of shape \[7, 1\] and is given \["):
        made(torch.zeros(given))
    made(torch.zeros(7, 3)).sum().backward()
    quantizer()(torch.zeros(given))
