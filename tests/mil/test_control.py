"""Loops and branches of Core ML programs in the interpreter, against numpy, and in the search for what overflows."""

from __future__ import annotations

import itertools
import warnings

import coremltools as ct
import coremltools.optimize as cto
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from kit.coreml import RANGED, texts
from kit.mil import program, save

from mptrain.core.errors import ExportError
from mptrain.export.coreml.convert import export_coreml
from mptrain.export.coreml.half import MilOps
from mptrain.mil import interpreter
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import OPERATIONS, Interpreter
from mptrain.mil.program import read_program
from mptrain.verify import overflow

draw = np.random.default_rng(0)
W = draw.normal(size=(4, 4)).astype(np.float32)
X = draw.normal(size=(2, 4)).astype(np.float32)
X *= np.sign(((1.5 * X) @ W.T).sum())  # after one round the sum is positive


def half(value):
    return value.astype(np.float16).astype(np.float32)


def exact(value):
    return value


def rounds(x, count, body):
    """`body` on x, `count` times, in a loop that carries a counter and a tensor."""
    return mb.while_loop(
        _cond=lambda i, a: mb.less(x=i, y=count),
        _body=lambda i, a: (mb.add(x=i, y=1), body(a)),
        loop_vars=(0, x),
    )[1]


def nested(x):
    """A loop; then either a product, or a loop that reads a value from outside and branches in every round."""
    a = rounds(x, 3, lambda a: mb.linear(x=mb.mul(x=a, y=1.5), weight=W))
    total = mb.reduce_sum(x=a, axes=[0, 1], keep_dims=False)

    def inner(i, u):
        even = mb.equal(x=mb.mod(x=i, y=2), y=0)
        chosen = mb.cond(pred=even, _true_fn=lambda: mb.add(x=u, y=a), _false_fn=lambda: mb.mul(x=u, y=0.3))
        return mb.add(x=i, y=1), chosen

    def otherwise():
        return mb.while_loop(_cond=lambda i, u: mb.less(x=i, y=4), _body=inner, loop_vars=(0, x))[1]

    return mb.cond(
        pred=mb.greater(x=total, y=0.0), _true_fn=lambda: mb.mul(x=a, y=2.0), _false_fn=otherwise, name="chosen"
    )


def nested_in_numpy(x, r):
    a = r(x)
    for _ in range(3):
        a = r(r(a * np.float32(1.5)) @ r(W).T)
    if r(a.sum()) > 0:
        return r(a * 2)
    u = r(x)
    for i in range(4):
        u = r(u * r(np.float32(0.3))) if i % 2 else r(u + a)
    return u


@pytest.mark.parametrize("rounding", ["fp32", "fp16", "stored"])
def test_nested_loops_and_branches_are_those_of_numpy(rounding, tmp_path):
    """stored: of a package whose operations coremltools made float16, which carries float32 around its loops."""
    stored = rounding == "stored"
    package = save(program(X.shape, nested), tmp_path, ct.precision.FLOAT16 if stored else ct.precision.FLOAT32)
    runner = Interpreter(package, rounding)
    wanted = [nested_in_numpy(x, exact if rounding == "fp32" else half) for x in (X, -X)]
    for x, expected in zip((X, -X), wanted):
        (found,) = runner({"x": x}).values()
        np.testing.assert_allclose(found, expected, rtol=1e-5 if rounding == "fp32" else 3e-3, atol=1e-5)
        if rounding != "fp32":
            assert np.array_equal(found, half(found)) and abs(found - nested_in_numpy(x, exact)).max() > 1e-5
    assert np.abs(wanted[0] + wanted[1]).max() > 0.1, "the two inputs take the two branches"


@pytest.mark.parametrize("rounding", ["fp32", "fp16"])
def test_a_loop_rounds_once_per_operation_and_round(rounding, tmp_path):
    package = save(program((3,), lambda x: rounds(x, 5, lambda a: mb.add(x=mb.mul(x=a, y=1.1), y=0.01))), tmp_path)
    x = np.array([0.1, 3.0, -7.7], np.float32)
    r = half if rounding == "fp16" else exact
    a = r(x)
    for _ in range(5):
        a = r(r(a * r(np.float32(1.1))) + r(np.float32(0.01)))
    runner = Interpreter(package, rounding)
    (found,) = runner({"x": x}).values()
    assert np.array_equal(found, a)
    inside = [op.name for op in runner.program.operations() if op.type in ("mul", "add")]
    kept = Interpreter(package, "fp16", keep_fp32=[*inside, "while_loop_0_0"])
    assert np.array_equal(*[next(iter(i({"x": x}).values())) for i in (kept, Interpreter(package, "fp32"))])


def test_a_loop_may_run_no_round_and_as_many_as_its_input_says(tmp_path):
    def build(n, x):
        return mb.while_loop(
            _cond=lambda i, a: mb.less(x=i, y=n),
            _body=lambda i, a: (mb.add(x=i, y=1), mb.add(x=a, y=x)),
            loop_vars=(0, x),
        )

    specs = [mb.TensorSpec(shape=(1,), dtype=types.int32), mb.TensorSpec(shape=(2,), dtype=types.fp32)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def main(n, x):
        return build(mb.squeeze(x=n), x)

    runner = Interpreter(save(main, tmp_path))
    x = np.array([1.5, -2.0], np.float32)
    for count in (0, 1, 7):
        counter, total = runner({"n": np.array([count], np.int32), "x": x}).values()
        assert counter == count and counter.dtype == np.int32
        np.testing.assert_array_equal(total, x * (count + 1))


def test_operations_in_blocks_have_records_over_all_rounds(tmp_path):
    def build(x):
        grown = rounds(x, 4, lambda a: mb.mul(x=a, y=20.0, name="grow"))
        positive = mb.greater(x=mb.reduce_max(x=x, axes=[0], keep_dims=False), y=0.0)
        return mb.cond(
            pred=positive,
            _true_fn=lambda: mb.add(x=grown, y=1.0, name="taken"),
            _false_fn=lambda: mb.mul(x=grown, y=0.5, name="not_taken"),
        )

    package = save(program((3,), build), tmp_path)
    x = {"x": np.array([1.0, 0.5, -0.2], np.float32)}
    rows = {row.name: row for row in Interpreter(package, "fp16").records([x, x])}
    assert rows["grow"].values == 2 * 4 * 3 and rows["grow"].largest == 20 * 8000
    assert rows["grow"].infinite == 2 * 2, "160000 and 80000, in the last round of each batch"
    assert rows["taken"].values == 6 and "not_taken" not in rows
    seen = []
    runner = Interpreter(package)
    runner.observe = lambda name, value: seen.append((name, float(value.max())))
    runner(x)
    assert [v for n, v in seen if n == "grow"] == [20, 400, 8000, 160000] and ("taken", 160001) in seen


def test_a_state_is_read_and_written_in_a_loop(tmp_path):
    specs = {"input_specs": [mb.TensorSpec(shape=(2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)]}

    @mb.program(**specs, opset_version=ct.target.iOS18)
    def main(x, total):
        def body(i):
            mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))
            return mb.add(x=i, y=1)

        count = mb.while_loop(_cond=lambda i: mb.less(x=i, y=3), _body=body, loop_vars=(0,))
        return mb.add(x=mb.read_state(input=total), y=mb.cast(x=count, dtype="fp16"))

    runner = Interpreter(save(main, tmp_path, ct.precision.FLOAT16))
    x = np.array([0.1, 1000.0], np.float32)
    total = np.zeros(2, np.float32)
    for _ in range(2):
        (found,) = runner({"x": x}).values()
        for _ in range(3):
            total = half(total + half(x))
        np.testing.assert_array_equal(runner.state["total"], total)
        np.testing.assert_array_equal(found, half(total + 3))


def test_compressed_weights_in_a_loop_are_decompressed(tmp_path):
    weight = draw.normal(size=(64, 64)).astype(np.float32)

    def build(x):
        return rounds(x, 2, lambda a: mb.linear(x=a, weight=weight))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.models.MLModel(str(save(program((1, 64), build), tmp_path)), skip_model_load=True)
        config = cto.coreml.OptimizationConfig(cto.coreml.OpLinearQuantizerConfig(dtype="int8", weight_threshold=0))
        package = tmp_path / "int8.mlpackage"
        cto.coreml.linear_quantize_weights(model, config).save(str(package))
    runner = Interpreter(package)
    inside = [op for op in runner.program.operations() if op.type.startswith("constexpr_")]
    assert inside, "the weight is compressed"
    x = draw.normal(size=(1, 64)).astype(np.float32)
    (found,) = runner({"x": x}).values()
    expected = x @ weight.T @ weight.T
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_unknown_operations_in_blocks_are_listed(tmp_path, monkeypatch):
    package = save(program((3,), lambda x: rounds(x, 2, lambda a: mb.tanh(x=mb.exp(x=a)))), tmp_path)
    monkeypatch.delitem(OPERATIONS, "tanh")
    with pytest.raises(ExportError, match=r"does not know these operations: tanh \(1×\)"):
        Interpreter(package)


def test_a_loop_that_rounding_makes_endless_is_an_error(tmp_path, monkeypatch):
    """2048 + 1 is 2048 in float16."""
    monkeypatch.setattr(interpreter, "ROUNDS", 3000)

    def build(x):
        return mb.while_loop(
            _cond=lambda a: mb.less(x=mb.reduce_max(x=a, axes=[0], keep_dims=False), y=2100.0),
            _body=lambda a: mb.add(x=a, y=1.0),
            loop_vars=(x,),
        )

    package = save(program((1,), build), tmp_path)
    x = {"x": np.array([0.0], np.float32)}
    assert next(iter(Interpreter(package)(x).values())) == 2100
    with pytest.raises(ExportError, match="still runs after 3000 rounds with fp16 rounding"):
        Interpreter(package, "fp16")(x)


# -- what overflows inside


def norms(x):
    """An RMS norm in every round, whose squares overflow."""

    def body(a):
        size = mb.reduce_mean(x=mb.mul(x=a, y=a, name="square"), axes=[-1], keep_dims=True, name="mean")
        return mb.mul(x=mb.mul(x=a, y=mb.rsqrt(x=size, name="root"), name="norm"), y=700.0, name="scale")

    return mb.mul(x=rounds(x, 3, body), y=0.5, name="last")


def converted(keep, folder, build):
    """The float16 package with the operations of these names in float32."""
    selector = ct.transform.FP16ComputePrecision(lambda op: op.name not in keep)
    folder.mkdir()
    return save(program((2, 8), build), folder, selector)


@pytest.mark.long
def test_the_search_keeps_the_fewest_operations_of_a_loop_and_the_package_is_right(tmp_path):
    package = save(program((2, 8), norms), tmp_path)
    x = {"x": torch.from_numpy(700 * draw.normal(size=(2, 8)).astype(np.float32))}
    ops = MilOps(package, [x])
    assert {op.name: op.inputs for op in ops.ops} == {
        "square": ("scale",),
        "mean": ("square",),
        "root": ("mean",),
        "norm": ("root", "scale"),
        "scale": ("norm",),
        "last": ("scale",),
    }
    found = overflow.search(ops)
    assert not found.before.right()
    expected = {"last": torch.as_tensor(Interpreter(package)(x)["last"])}
    healing = set()
    names = [op.name for op in ops.ops]
    for kept in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(5)):
        if overflow.compare(expected, ops.run(0, kept)).right():
            healing.add(kept)
    assert set(found.keep) == {"square", "mean", "root"} == set(min(healing, key=len))
    assert found.ranges["square"].largest > 65504 and found.ranges["scale"].largest < 65504
    runner = Interpreter(converted(ops.with_views(found.keep), tmp_path / "half", norms))
    plain = Interpreter(converted((), tmp_path / "plain", norms))
    right = [overflow.compare(expected, {"last": torch.as_tensor(run(x)["last"])}).right() for run in (runner, plain)]
    assert right == [True, False]


def test_casts_of_what_a_loop_carries_are_counted(tmp_path):
    """Core ML carries float32: a cast on the way into the body, and one out of it."""
    package = save(program((3,), lambda x: rounds(x, 2, lambda a: mb.mul(x=a, y=1.5))), tmp_path, ct.precision.FLOAT16)
    found = read_program(package)
    (loop,) = (op for op in found.operations() if op.type == "while_loop")
    assert [[r.dtype for r in block.inputs] for block in loop.blocks] == [["INT32", "FLOAT32"]] * 2
    casts = [op for op in found.operations() if op.type == "cast"]
    assert facts(found)["float_casts"] == len(casts)


@torch.jit.script
def normed(x, count: int):
    for _ in range(count):
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True)) * 700.0
    return x


class Looped(torch.nn.Module):
    """As many rounds as there are tokens, with squares that overflow."""

    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 4)
        self.table.weight.data *= 700

    def forward(self, input_ids):
        x = self.table(input_ids)
        return {"logits": self.out(normed(x, x.shape[1]))}


def test_a_scripted_loop_is_exported_in_half_with_its_squares_in_float32(tmp_path):
    torch.manual_seed(0)
    model, batch = Looped().eval(), texts(2, 9, mask=False)
    calibration = [texts(2, 9, mask=False, seed=1)]
    done = export_coreml(
        model, batch, tmp_path / "out", precision="fp16", shapes=RANGED, route="trace", calibration=calibration
    )
    runner = Interpreter(done.package)
    assert any(op.type == "while_loop" for op in runner.program.main.operations)
    kinds = {op.name: op.type for op in runner.program.operations()}
    assert sorted(kinds[name] for name in done.half["kept_fp32"]) == ["mul", "reduce_mean", "rsqrt"]
    other = texts(3, 5, mask=False, seed=7)
    with torch.no_grad():
        expected = model(**other)
    assert overflow.compare(expected, {"logits": torch.as_tensor(runner(other)["logits"]).float()}).right()
