"""One half-precision step of very many architectures: the loss and the gradients are those of fp32 within rounding.

What an architecture does with fp32 inputs, buffers and losses beside half weights is its own; this finds out. The
bound is the resolution of the dtype, or where rounding is amplified (batch norms of four pictures) twice what fp32
itself is off with rounded weights, or under torch's autocast, which keeps fp32 weights.
"""

import pytest
import torch
from kit.architectures import ARCHITECTURES, build

from mptrain import MasterWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESOLUTION = {"bf16": 2**-8, "fp16": 2**-11}
STEPS = 12
"""by then the loss scale has found its place"""

QUICK = {"bert", "llama", "mixtral", "t5", "vit", "clip", "wav2vec2"}


def loss_of(model, batch):
    torch.manual_seed(1)  # for routers and other noise in a forward pass
    return model(**batch).loss


def reference(name, dtype):
    """Loss in fp32, norm of its gradients, and the larger error of rounded weights and of autocast where it runs."""
    model, batch = build(name)
    loss = loss_of(model, batch)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model, batch = build(name)
    errors = []
    try:
        with torch.autocast("cpu", dtype):
            errors.append(loss_of(model, batch) - loss)
    except RuntimeError:
        pass
    model, batch = build(name)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    errors.append(loss_of(model, batch) - loss)
    return loss.item(), norm.item(), max(abs(e.item()) for e in errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES]
)
def test_a_step_in_half_is_that_of_fp32(name, dtype, caplog):
    expected, expected_norm, noise = reference(name, DTYPES[dtype])
    model, batch = build(name)
    mw = MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=1e-3), dtype)
    before = {n: m.clone() for n, m in mw.masters.read().items()}
    first = loss_of(model, batch)
    assert first.dtype == torch.float32
    bound = max(RESOLUTION[dtype] * max(abs(expected), 1.0), 2 * noise)
    assert first.item() == pytest.approx(expected, abs=bound)
    for step in range(STEPS):
        mw.backward(first if step == 0 else loss_of(model, batch))
        if mw.step():
            break
    assert mw.skipped_steps == step < STEPS - 1
    steady = noise < RESOLUTION[dtype]
    assert mw.grad_norm == pytest.approx(expected_norm, rel=0.1 if steady else 1.0)
    after = mw.masters.read()
    assert all(m.isfinite().all() for m in after.values())
    assert any(not torch.equal(m, before[n]) for n, m in after.items())
    assert "is rounded to" not in caplog.text  # no input lost what it says
    assert torch._C._len_torch_function_stack() == 0
