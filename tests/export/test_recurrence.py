"""A recurrence is a loop in the file, right at every length; one that a trace wrote out is refused."""

from __future__ import annotations

from contextlib import closing

import openvino as ov
import pytest
import torch
from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.weights import weight_only
from mptrain.core.errors import ExportError, ModelError
from mptrain.core.recurrence import Recurrence
from mptrain.core.signature import probed
from mptrain.data.sources.dien import Gated, dien
from mptrain.export.base import Source
from mptrain.export.formats import format_of
from mptrain.export.openvino.recurrence import graphs_of
from mptrain.recipe import EXPORTS, Ptq, WeightOnly
from mptrain.verify.parity import compare

SIZES = [(1, 2), (1, 3), (2, 9), (3, 5), (1, 10), (2, 40)]
FORMATS = ["openvino", "onnx"]


def batch(rows, length, padded=0):
    ids = torch.randint(3, 35, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def source_and_format(model, name, precision="fp32"):
    spec = EXPORTS[name].model_validate({"id": "x", "format": name, "of": ["model"], "precision": [precision]})
    example = batch(2, 9, padded=2)
    return Source(lambda: model, probed(model, example), example, precision, "fp32", False, lambda: [example]), (
        format_of(spec)
    )


class Read(nn.Module):
    """The last state of a sequence, by `steps`."""

    def __init__(self, size=8):
        super().__init__()
        self.table, self.to_steps, self.cell = nn.Embedding(35, size), nn.Linear(size, 3 * size), Gated(size, False)
        self.steps = Recurrence(self.cell)
        self.out = nn.Linear(size, 1)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        return {"logits": self.out(self.last(self.to_steps(x), torch.zeros_like(x[:, 0]), attention_mask))}

    def last(self, x, state, mask):
        return self.steps(x, state)[:, -1]


class Ranged(Read):
    """As anybody writes it: a trace has as many steps as its example."""

    def last(self, x, state, mask):
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state


class Held(Read):
    """Padding holds the state: where a step that is not there reads as zeros, shorter inputs are right by accident."""

    def last(self, x, state, mask):
        for step in range(x.shape[1]):
            kept = mask[:, step, None].to(x.dtype)
            state = kept * self.cell(x[:, step], state) + (1 - kept) * state
        return state


class Unbound(Read):
    def last(self, x, state, mask):
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


def test_states_and_gradients_are_those_of_torch_with_its_gates():
    size, rows, steps = 5, 3, 7
    torch.manual_seed(0)
    theirs, cell, before = nn.GRU(4, size, batch_first=True), Gated(size, False), nn.Linear(4, 3 * size)
    with torch.no_grad():  # torch has reset before update, and keeps where ours takes what is new
        for ours, name in ((before, "ih"), (cell.hidden, "hh")):
            for kind in ("weight", "bias"):
                reset, update, new = getattr(theirs, f"{kind}_{name}_l0").chunk(3)
                getattr(ours, kind).copy_(torch.cat([-update, reset, new]))
    x = torch.randn(rows, steps, 4, requires_grad=True)
    found, wanted = Recurrence(cell)(before(x), torch.zeros(rows, size)), theirs(x)[0]
    assert torch.allclose(found, wanted, atol=1e-6)
    gradients = [torch.autograd.grad(value.square().sum(), x)[0] for value in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-5)


LONG = pytest.mark.long


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [pytest.param(Read, marks=LONG), dien])
def test_a_recurrence_is_right_at_every_length(make, name, tmp_path):
    model = seeded(make)
    source, form = source_and_format(model, name)
    done = form.write(source, tmp_path)
    others = [batch(rows, length, length // 3) for rows, length in SIZES]
    with closing(form.open(done.path, source)) as runner:
        for other in others:
            assert compare(model, runner, [other], signature=source.signature)["max_abs_diff"] < 1e-5
        facts = runner.facts()
    names = [place for place, module in model.named_modules() if isinstance(module, Recurrence)]
    if name == "openvino":
        assert facts.more["loops"] == {"TensorIterator": len(names)}
    else:
        assert facts.more["operations"]["Loop"] == len(names)
        hidden = {f"{place}.cell.hidden" for place in names}
        assert hidden <= set(facts.fp32_layers), "the torch modules of what loops compute are known"
    assert all(model.get_submodule(place)._stand_in is None for place in names)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Held, "openvino"),
        (Ranged, "onnx"),
        *(pytest.param(make, "openvino", marks=LONG) for make in (Ranged, Unbound)),
        *(pytest.param(make, "onnx", marks=LONG) for make in (Held, Unbound)),
    ],
)
def test_steps_that_a_trace_wrote_out_are_refused_before_anything_is_written(make, name, tmp_path):
    source, form = source_and_format(seeded(make), name)
    with pytest.raises(ExportError, match=r"computes for the sizes of one example alone .* mptrain\.Recurrence"):
        form.write(source, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"one example alone"):  # and before training
        form.check(source.model, source.example, source.signature)


def test_a_scripted_loop_stays_one_in_openvino(tmp_path):
    @torch.jit.script
    def decayed(x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.size(1)):
            state = 0.5 * state + x[:, step]
        return state

    class Scripted(Read):
        def last(self, x, state, mask):
            return decayed(x[..., :8])

    model = seeded(Scripted)
    source, form = source_and_format(model, "openvino")
    done = form.write(source, tmp_path)
    with closing(form.open(done.path, source)) as runner:
        assert compare(model, runner, [batch(2, 30)], signature=source.signature)["max_abs_diff"] < 1e-5


class Fused(Read):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(24, 8, batch_first=True)

    def last(self, x, state, mask):
        return self.gru(x)[0][:, -1]


def test_a_recurrence_of_torch_is_a_fused_sequence_in_openvino(tmp_path):
    model = seeded(Fused)
    source, form = source_and_format(model, "openvino")
    done = form.write(source, tmp_path)
    with closing(form.open(done.path, source)) as runner:
        found = compare(model, runner, [batch(*size) for size in SIZES], signature=source.signature)
        assert found["max_abs_diff"] < 1e-5 and runner.facts().more["loops"] == {"RNNSeq": 1}


@pytest.mark.parametrize("name", ["openvino", pytest.param("onnx", marks=LONG)])
def test_integers_of_a_cell_are_stored_and_computed_with(name, tmp_path):
    model = seeded(dien)
    config = {"mode": "weight_only", "method": "rtn", "bits": 8, "granularity": "channel"}
    weight_only.compress(model, WeightOnly.model_validate(config))
    source, form = source_and_format(model, name, "compressed")
    done = form.write(source, tmp_path)
    with closing(form.open(done.path, source)) as runner:
        found = compare(model, runner, [batch(*size) for size in SIZES], signature=source.signature)
        types = {kind.lower(): size for kind, size in runner.facts().weight_types.items()}
    assert found["max_abs_diff"] < 1e-4
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    integers = sum(size for kind, size in types.items() if kind in ("i8", "u8", "int8", "uint8"))
    assert integers == matrices


def test_quantizers_leave_cells_alone_and_the_file_is_the_model_at_every_length(tmp_path, caplog):
    model = quantizers.quantize(seeded(dien), Ptq(mode="ptq"), [batch(8, 9), batch(8, 20)])
    placed = [name for name, module in model.named_modules() if isinstance(module, FakeQuantizer)]
    assert placed and not [name for name in placed if "cell" in name]
    assert "interests.cell, evolution.cell stay float" in caplog.text
    source, form = source_and_format(model, "openvino", "int8")
    done = form.write(source, tmp_path)
    with closing(form.open(done.path, source)) as runner:
        found = compare(model, runner, [batch(*size) for size in SIZES], signature=source.signature)
        facts = runner.facts()
    assert found["max_abs_diff"] < 5e-3 and set(facts.int8_layers) >= {"to_interests", "to_evolution", "hidden"}


@LONG
def test_the_file_does_not_depend_on_what_was_converted_before(tmp_path):
    files = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        source, form = source_and_format(seeded(dien), "openvino")
        files.append(form.write(source, tmp_path / place).path)
    assert files[0].read_bytes() == files[1].read_bytes()
    graph = ov.Core().read_model(files[0])
    names = [node.get_friendly_name() for inner in graphs_of(graph) for node in inner.get_ops()]
    assert "self.model.evolution.cell.hidden.weight" in names


def test_fp16_of_onnx_is_refused(tmp_path):
    model = seeded(dien)
    source, form = source_and_format(model, "onnx", "fp16")
    for refused in (lambda: form.write(source, tmp_path), lambda: form.check(model, source.example, source.signature)):
        with pytest.raises(ExportError, match=r"fp16.*interests.*fp32"):
            refused()


@LONG
def test_fp16_of_openvino_is_right(tmp_path):
    model = seeded(dien)
    source, form = source_and_format(model, "openvino", "fp16")
    done = form.write(source, tmp_path)
    with closing(form.open(done.path, source)) as runner:
        assert compare(model, runner, [batch(2, 30)], signature=source.signature)["max_abs_diff"] < 5e-3
        assert runner.facts().weight_types["f16"] > 20_000


def test_what_a_recurrence_cannot_be():
    with pytest.raises(ModelError, match="inside the cell"):
        Recurrence(nn.Sequential(Recurrence(Gated(4, False))))
    with pytest.raises(ModelError, match="at least one step"):
        Recurrence(Gated(4, False))(torch.zeros(2, 0, 12), torch.zeros(2, 4))
