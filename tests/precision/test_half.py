"""Products of half matrices without half kernels: what an exact sum rounds to, and of the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from kit import tiny_models

from mptrain.precision.half import float_products, in_half

SUMS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x[0], w, w[:, 0]),
    "batched": lambda x, w: x @ w.T.expand(3, -1, -1),
    "convolution": lambda x, w: F.conv1d(x.transpose(1, 2), w[:, :, None]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SUMS)
def test_a_product_is_the_exact_sum_rounded_once(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 5, 64, generator=generator).to(dtype), torch.randn(7, 64, generator=generator).to(dtype)
    with torch.no_grad(), float_products():
        found = SUMS[name](x, w)
    exact = SUMS[name](x.double(), w.double())
    assert found.dtype == dtype
    near = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((found.double() - exact).abs() <= near).all()


def test_what_is_no_product_of_halves_stays_as_it_is():
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    with torch.no_grad(), float_products():
        assert torch.equal(x @ w, torch.mm(x, w)) and (x.half() * 70_000).isinf().any()


def test_a_copy_in_half_shares_what_is_tied_and_leaves_the_model_alone():
    model = tiny_models.tiny("opt", tie_word_embeddings=True)
    model.tie_weights()
    half = in_half(model, ["norms"], "bf16")
    assert half.get_input_embeddings().weight is half.get_output_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kept = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept and all("norm" in name for name in kept)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in half.parameters())
