"""Moments of 8 bits: what a code stands for, how it is rounded, and masters that have them."""

import pytest
import torch
from kit.training import same
from safetensors.torch import load_file
from torch import nn

from mptrain.core.errors import UserError
from mptrain.precision import MasterWeights, moments8
from mptrain.precision.moments8 import BLOCK, EXPONENTS, FIRST, SECOND, STRIDE, decode, encode, thresholds
from mptrain.train.checkpoint import load_state, save_state

CPU = torch.device("cpu")


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))


def loss_of(model, i):
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def wrap(model, optimizer=torch.optim.AdamW, master="split", moments="int8", **options):
    return MasterWeights(model, optimizer(model.parameters(), lr=1e-2), "bf16", master, moments=moments, **options)


def train(mw, model, steps):
    losses = []
    for i in steps:
        loss = loss_of(model, i)
        mw.backward(loss)
        assert mw.step()
        losses.append(loss.item())
    return losses


def masters(mw):
    return {n: m.clone() for n, m in mw.masters.read().items()}


# -- codes


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("exponent", [80, 100, 127, 150])
def test_every_code_is_a_number_that_has_this_code(name, exponent):
    signed = name == FIRST
    codes = torch.arange(-127, 128) if signed else torch.arange(256)
    codes = torch.cat([codes, codes.new_full((-len(codes) % BLOCK,), 127 if signed else 255)])
    codes = codes.view(-1, BLOCK).clone()
    codes[:, 0] = codes.max()  # in the top binade, so that each block has this exponent
    codes = codes.view(-1).to(moments8.BUFFERS[name][0])
    exponents = torch.full((len(codes) // BLOCK,), exponent, dtype=torch.uint8)
    values = decode(name, codes, exponents)
    assert len(values.unique()) == len(codes.unique())
    again, found = encode(name, values.clone())
    assert torch.equal(again, codes) and torch.equal(found, exponents)


def test_a_code_is_within_a_sixteenth_and_small_ones_err_to_the_safe_side():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100 * BLOCK, generator=generator).exp().pow(4) * 1e-3  # 12 decades
    values[::5] = 0.0
    threshold = thresholds(FIRST, 0, len(values), 3, CPU)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    tops = values.view(-1, BLOCK).amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)

    m = decode(FIRST, *encode(FIRST, values * signs, threshold))
    lost = m == 0
    assert torch.equal(m[~lost].sign(), signs[~lost].float())
    assert ((m.abs() - values).abs() <= (values / 16).maximum(tops / 2**10)).all()
    assert (values[lost] <= tops[lost] / 2**10).all() and (values[lost] > 0).any()

    s = decode(SECOND, *encode(SECOND, values.square(), threshold)).sqrt()
    assert torch.equal(s == 0, values == 0)
    inside = values > tops / 2**7
    assert ((s - values).abs() <= values / 31.9)[inside].all() and not inside.all()
    assert (s >= values * 31 / 32).all()


@pytest.mark.parametrize(("name", "bound"), [(FIRST, 1 / 32), (SECOND, 1 / 45)])
def test_rounding_is_right_in_the_mean_of_few_steps(name, bound):
    """64 steps: with random thresholds the mean would be off by a sixteenth of a code."""
    values = 1 + torch.rand(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.9
    total = torch.zeros(BLOCK)
    for step in range(64):
        threshold = thresholds(name, 0, BLOCK, step, CPU)
        found = decode(name, *encode(name, values.square() if name == SECOND else values.clone(), threshold))
        total += found.sqrt() if name == SECOND else found
    assert (total / 64 - values).abs().max() < 1 / 16 * bound


def test_every_eight_steps_the_rounding_of_m_covers_all_eighths():
    turns = torch.tensor([[moments8.turn(FIRST, 8 * group + i) / 2**32 for i in range(8)] for group in range(500)])
    assert torch.equal((turns * 8).long().sort(1).values, torch.arange(8).expand(500, 8))
    orders = (turns * 8).long().mul(8 ** torch.arange(8)).sum(1)
    assert len(orders.unique()) > 480  # of 40,320
    begins = turns * 8 % 1
    assert begins.std(1).max() < 1e-5 and abs(begins.mean() - 0.5) < 0.04


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.05])
def test_the_first_moment_keeps_its_size_where_gradients_are_rare(share):
    """Rows of an embedding. Thresholds that walk by the golden ratio make it 0.1, 0.4, 1.3 and 1.9% too small."""
    generator = torch.Generator().manual_seed(0)
    size = 64 * BLOCK
    exact, codes, exponents = torch.zeros(size), *encode(FIRST, torch.zeros(size))
    way = wanted = torch.zeros(size)
    for step in range(1, 401):
        rows = (torch.rand(size // 32, generator=generator) < share).repeat_interleave(32)
        g = (torch.randn(size, generator=generator) + 1) * rows
        exact = exact + 0.1 * (g - exact)
        found = decode(FIRST, codes, exponents)
        found = found + 0.1 * (g - found)
        way, wanted = way + found, wanted + exact
        codes, exponents = encode(FIRST, found, thresholds(FIRST, 0, size, step, CPU))
    assert abs((way @ wanted) / (wanted @ wanted) - 1) < 1e-3


def test_the_second_moment_follows_though_a_step_changes_it_by_less_than_a_code():
    """To the nearest code it would stay where it was after the first hundred steps."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 0, 8 * BLOCK)[torch.randperm(8 * BLOCK, generator=generator)]
    exact = torch.zeros(8 * BLOCK)
    codes, exponents = encode(SECOND, exact)
    for step in range(1, 1501):
        g = torch.randn(8 * BLOCK, generator=generator) * scale * (1.0 if step < 500 else 0.3)
        exact = 0.999 * exact + 0.001 * g.square()
        found = 0.999 * decode(SECOND, codes, exponents) + 0.001 * g.square()
        codes, exponents = encode(SECOND, found, thresholds(SECOND, 0, 8 * BLOCK, step, CPU))
    ratio = (decode(SECOND, codes, exponents) / exact).sqrt()
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 0.07 and ratio.min() > 0.7 and ratio.max() < 1.5


# -- masters with them


def test_state_takes_eight_bytes_a_parameter():
    model = nn.Linear(256, 256)
    mw = wrap(model)
    mw.backward(model(torch.randn(4, 256)).sum())
    mw.step()
    (flat,) = mw.flats
    parameters = sum(p.numel() for p in model.parameters())
    held = [flat.half, flat.low, *flat.states.values()]
    assert flat.master is None and len(flat.states) == 4
    assert sum(t.nbytes for t in held) + 2 * parameters == pytest.approx((8 + 2 / 64) * parameters)


def test_kept_parameters_have_fp32_moments():
    model = make_model()
    mw = wrap(model, keep_fp32=["norms"])
    train(mw, model, [0, 1])
    by_name = {n: mw.optimizer.state[e.master] for n, (_, e) in mw.masters.by_name.items()}
    assert by_name["1.weight"][SECOND].dtype == torch.float32 and EXPONENTS[SECOND] not in by_name["1.weight"]
    assert by_name["0.weight"][FIRST].dtype == torch.int8 and by_name["0.weight"][SECOND].dtype == torch.uint8
    assert by_name["0.weight"][FIRST].shape == (20, 6) and len(by_name["0.weight"][EXPONENTS[FIRST]]) == 2


@pytest.mark.parametrize("how", ["torch.save", "safetensors and JSON"])
@pytest.mark.parametrize("keep", [(), ("norms",)], ids=["all", "norms kept"])
def test_resume_is_bit_identical(tmp_path, how, keep):
    def start(seed):
        model = make_model(seed)
        return model, wrap(model, keep_fp32=keep)

    model, mw = start(0)
    train(mw, model, range(5))
    state = mw.state_dict()
    if how == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        save_state(state, tmp_path / "state")
        saved = load_file(tmp_path / "state.safetensors")
        assert {str(t.dtype) for n, t in saved.items() if ".exp_avg" in n} >= {"torch.int8", "torch.uint8"}
        state = load_state(tmp_path / "state")
    losses = train(mw, model, range(5, 12))
    again, resumed = start(7)
    resumed.load_state_dict(state)
    assert train(resumed, again, range(5, 12)) == losses
    assert same(masters(resumed), masters(mw))


def test_fp32_moments_are_read_and_given():
    """From bf16-split, back to it, to torch's AdamW, and after release."""
    model, other, third = make_model(0), make_model(1), make_model(2)
    mw, reader, back = wrap(model, moments="fp32"), wrap(other), wrap(third, moments="fp32")
    train(mw, model, range(3))
    reader.load_state_dict(mw.state_dict())
    assert same(masters(reader), masters(mw))
    wanted = mw.optimizer.state_dict()["state"]
    found = moments8.plain(reader.optimizer.state_dict())["state"]
    for i, state in wanted.items():
        assert state["step"] == found[i]["step"] == 3
        for name, bound in ((FIRST, 1 / 32), (SECOND, 1 / 15)):
            near = (found[i][name] - state[name]).abs() <= bound * state[name].abs() + 1e-2 * state[name].abs().max()
            assert found[i][name].shape == state[name].shape and near.all()
    back.load_state_dict(reader.state_dict())  # codes to fp32: exactly
    assert all(
        torch.equal(back.optimizer.state_dict()["state"][i][n], found[i][n]) for i in found for n in (FIRST, SECOND)
    )
    reader.load_state_dict(back.state_dict())  # and what codes stood for has these codes
    again = moments8.plain(reader.optimizer.state_dict())["state"]
    assert all(torch.equal(again[i][n], found[i][n]) for i in found for n in (FIRST, SECOND))
    optimizer = reader.optimizer
    reader.release()
    state = optimizer.state_dict()["state"]
    assert all(
        torch.equal(state[i][n], found[i][n]) and set(state[i]) == {"step", FIRST, SECOND}
        for i in found
        for n in (FIRST, SECOND)
    )
    loss_of(other, 3).backward()
    optimizer.step()
    plain = torch.optim.AdamW(third.parameters())
    plain.load_state_dict(moments8.plain({"state": state, "param_groups": optimizer.state_dict()["param_groups"]}))


def test_a_layer_in_another_memory_order_keeps_its_moments():
    """Blocks are in memory order, and a model that is loaded need not have that of the one that was saved."""
    torch.manual_seed(0)
    one, other = (nn.Conv2d(8, 8, 3) for _ in range(2))
    one.to(memory_format=torch.channels_last)
    mw, reader = wrap(one), wrap(other)
    for seed in range(3):
        mw.backward(one(torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(seed))).square().sum())
        mw.step()
    state = mw.state_dict()
    assert state["state"][0][STRIDE] == list(one.weight.stride()) != list(other.weight.stride())
    reader.load_state_dict(state)
    found, wanted = (moments8.plain(m.optimizer.state_dict())["state"][0] for m in (reader, mw))
    for name in (FIRST, SECOND):
        far = (found[name] - wanted[name]).abs() > wanted[name].abs().max() / 2**9
        assert not far.any() and torch.equal(found[name].argmax(), wanted[name].argmax())


@pytest.mark.parametrize("rows", [30, 12])
def test_a_resized_parameter_keeps_its_moments(rows):
    model = nn.Sequential(nn.Embedding(20, 48), nn.Linear(48, 3))
    mw = wrap(model)
    mw.backward(model(torch.arange(20)).square().sum())
    mw.step()
    name = "0.weight"
    before = moments8.decoded(mw.optimizer.state[mw.masters.by_name[name][1].master])
    with mw.exposed():
        model[0].weight = nn.Parameter(torch.zeros(rows, 48))
    state = mw.optimizer.state[mw.masters.by_name[name][1].master]
    after = moments8.decoded(state)
    kept = min(rows, 20)
    assert moments8.is_coded(state) and after[FIRST].shape == (rows, 48)
    for which in (FIRST, SECOND):
        near = (after[which][:kept] - before[which][:kept]).abs() <= before[which].abs().max() / 2**9
        assert near.all() and (after[which][kept:] == 0).all()
    mw.backward(model(torch.arange(rows)).square().sum())
    assert mw.step()


def test_training_follows_fp32_moments():
    model, other = make_model(), make_model()
    coded, exact = wrap(model), wrap(other, moments="fp32")
    losses, expected = train(coded, model, range(60)), train(exact, other, range(60))
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected


def test_what_does_not_fit_is_refused_by_name():
    model = make_model()
    with pytest.raises(UserError, match="moments 'int8' needs split masters, got master='fp32': use master='split'"):
        wrap(model, master="fp32")
    with pytest.raises(UserError, match="moments must be 'fp32' or 'int8', got 'int4'"):
        wrap(model, moments="int4")
    with pytest.raises(
        UserError, match=r"needs Adam or AdamW .*got SGD with its settings: use AdamW, or moments='fp32'"
    ):
        wrap(model, torch.optim.SGD)
    with pytest.raises(UserError, match=r"got AdamW with its settings"):
        MasterWeights(model, torch.optim.AdamW(model.parameters(), amsgrad=True), "bf16", "split", moments="int8")
