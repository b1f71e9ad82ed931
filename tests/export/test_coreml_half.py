"""FP16 packages of Core ML: what overflows is found, kept in float32 with few casts, and checked."""

from __future__ import annotations

import itertools

import pytest
import torch
from kit.coreml import RANGED, TwoOutputs, small, texts
from kit.tiny_models import tiny
from torch import nn

from mptrain.core.errors import ExportError
from mptrain.core.signature import probed
from mptrain.export.coreml import convert
from mptrain.export.coreml.convert import export_coreml
from mptrain.export.coreml.half import MilOps, spellings
from mptrain.export.torch.traceable import traceable_masks
from mptrain.mil.interpreter import Interpreter
from mptrain.report.words import kept_in_fp32
from mptrain.verify.outputs import rows
from mptrain.verify.overflow import casts, compare


class UForm(TwoOutputs):
    """Attention whose mask is (1 - m) * finfo.min, in a text encoder with two outputs."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, input_ids, attention_mask):
        mask = (1.0 - attention_mask.float()[:, None, None, :]) * torch.finfo(torch.float32).min
        hidden = self.table(input_ids)
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-1, -2) / 8**0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        features = self.down(torch.nn.functional.gelu(self.up(hidden + mixed)))
        return {"features": features, "embeddings": torch.nn.functional.normalize(features[:, 0], dim=-1)}


class Table(nn.Module):
    """16 values to a token, through `function`, and a linear layer."""

    def __init__(self, values, function):
        super().__init__()
        self.table, self.out, self.function = nn.Embedding(50, 16), nn.Linear(16, 4), function
        self.table.weight.data = values(self.table.weight.data)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.out(self.function(self.table(input_ids)))}


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)


def up_to(largest):
    return lambda x: largest / 2 + largest / 2 * torch.sin(x)


# Of each: the values it reads, what it does, and the operations that no fp16 package is right without.
TABLES = {
    "RMS norm of large values": (lambda x: 1000 * x, rms_norm, ["add", "mul", "reduce_mean", "rsqrt"]),
    "RMS norm of small values": (lambda x: 1e-4 * x, rms_norm, ["add", "mul", "reduce_mean", "rsqrt"]),
    "softplus": (up_to(30), lambda x: torch.log(1 + torch.exp(x)), ["add", "exp", "log"]),
    "softplus, log1p": (up_to(30), lambda x: torch.log1p(torch.exp(x)), ["exp", "log"]),
    "softmax without its maximum": (
        up_to(20),
        lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
        ["exp", "real_div", "reduce_sum"],
    ),
}


def kept(model, tmp_path, batches=None, **options):
    batches = batches or [texts(2, 9, seed=1), texts(3, 5, seed=2)]
    return export_coreml(
        model.eval(), texts(2, 9), tmp_path / "out", precision="fp16", shapes=RANGED, calibration=batches, **options
    )


def plain(model, folder):
    """An fp16 package without the search."""
    return export_coreml(model.eval(), texts(2, 9), folder, precision="fp16", shapes=RANGED).package


def difference(model, package, batch):
    signature = probed(model, batch)
    with torch.no_grad():
        expected = model(**batch)
    return compare(*(rows(each, batch, signature) for each in (expected, Interpreter(package)(batch))))


def smallest(model, batches, folder, most):
    """Of all sets of at most `most` operations that heal the model: the smallest ones, and the fewest casts of one."""
    package = export_coreml(model.eval(), texts(2, 9), folder, shapes=RANGED).package
    program = MilOps(package, batches, probed(model, batches[0]))
    names = [op.name for op in program.ops]
    reference = [program.run(batch, names) for batch in range(len(batches))]
    for size in range(most + 1):
        sets = [
            kept
            for kept in itertools.combinations(names, size)
            if all(compare(reference[b], program.run(b, kept)).right() for b in range(len(batches)))
        ]
        if sets:
            return sets, min(casts(program.ops, kept) for kept in sets)
    raise AssertionError(f"no {most} operations are enough")


def casts_in(package):
    """Conversions between float16 and float32, counted in the file."""
    program = Interpreter(package).program
    kinds = {feature.name: feature.dtype for feature in program.inputs}
    count = 0
    for op in program.operations():
        kinds |= {result.name: result.dtype for result in op.results}
        count += op.type == "cast" and {kinds[op.inputs["x"][0].name], op.results[0].dtype} == {"FLOAT16", "FLOAT32"}
    return count


def types_of(done):
    kinds = {op.name: op.type for op in Interpreter(done.package).program.operations()}
    return sorted(kinds[name] for name in done.half["kept_fp32"])


def check_casts(done, expected):
    """In the file, in the facts, and in what the report says."""
    found = casts_in(done.package), done.half["casts"], done.half["float_casts"]
    assert found == (expected,) * 3
    assert done.half["said"].endswith(f"; {expected} float↔half casts")
    reported = f"; {expected} float↔half casts" if done.half["kept_fp32"] else "no op has to stay in fp32"
    assert kept_in_fp32(done.half).endswith(reported)


BATCHES = [texts(2, 9, seed=1), texts(3, 5, seed=2)]


@pytest.mark.long
@pytest.mark.parametrize("route", ["export", "trace"])
def test_the_mask_of_uform_is_found_with_two_casts(route, tmp_path):
    torch.manual_seed(0)
    model = UForm()
    assert not difference(model, plain(model, tmp_path / "plain"), BATCHES[0]).finite, "0 · -inf"
    done = kept(model, tmp_path, route=route)
    assert not done.half["all_half"]["finite"]
    sets, fewest = smallest(model, BATCHES, tmp_path / "fp32", 1)
    assert len(sets) == 1 == len(done.half["kept_fp32"]) and types_of(done) == ["mul"]
    assert done.half["said"].startswith("1 op in FP32: ")
    check_casts(done, fewest)
    assert fewest == 2, "one in, one out"
    assert difference(model, done.package, texts(4, 12, seed=7)).cosine > 0.9999


@pytest.mark.parametrize(
    ("case", "route"),
    [
        *(pytest.param(case, "export", marks=[pytest.mark.long] * (number > 0)) for number, case in enumerate(TABLES)),
        pytest.param("softplus", "trace", marks=pytest.mark.long),
    ],
)
def test_what_overflows_or_underflows_is_kept_with_the_fewest_operations_and_casts(case, route, tmp_path):
    torch.manual_seed(0)
    values, function, expected = TABLES[case]
    model = Table(values, function)
    naive = difference(model, plain(model, tmp_path / "plain"), BATCHES[0])
    assert not naive.right(), "plain fp16 is wrong"
    assert naive.finite == case.startswith("RMS"), "a norm goes wrong without a NaN"
    done = kept(model, tmp_path, route=route)
    sets, fewest = smallest(model, BATCHES, tmp_path / "fp32", len(expected))
    assert types_of(done) == expected and {len(kept) for kept in sets} == {len(expected)}
    check_casts(done, fewest)
    for batch in [*BATCHES, texts(4, 12, seed=7)]:
        assert difference(model, done.package, batch).cosine > 0.9999


def test_the_softplus_operation_of_large_values_is_right_in_half(tmp_path):
    torch.manual_seed(0)
    model = Table(up_to(30), nn.functional.softplus)
    done = kept(model, tmp_path)
    assert done.half["kept_fp32"] == {} and difference(model, done.package, BATCHES[0]).cosine > 0.9999
    check_casts(done, 0)


def left_padded():
    batches = [texts(3, length, seed=length) for length in (9, 6)]
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    return batches


@pytest.mark.long
def test_a_left_padded_eager_llama_is_right_in_half(tmp_path, monkeypatch):
    """Rows of padding see nothing: with the finfo.min of transformers they are NaN in fp16, which the second layer
    spreads to all rows. The export makes masks finite in fp16; without that the search finds what to keep."""
    batches, model = left_padded(), tiny("llama", "eager")
    done = kept(model, tmp_path, batches)
    assert done.half["kept_fp32"] == {} and difference(model, done.package, batches[0]).cosine > 0.9999
    check_casts(done, 0)

    monkeypatch.setattr(convert, "traceable_masks", lambda masked: traceable_masks(torch.finfo(torch.float32).min))
    naive = difference(model, plain(model, tmp_path / "plain"), batches[0])
    assert not naive.finite, "NaN where tokens count"
    mended = export_coreml(
        model, texts(2, 9), tmp_path / "mended", precision="fp16", shapes=RANGED, calibration=batches
    )
    assert types_of(mended) == ["add", "select", "softmax"], "the mask, one layer's scores with it, their softmax"
    check_casts(mended, 3)  # of the mask for the other layer, of the scores, of the softmax
    assert difference(model, mended.package, batches[0]).cosine > 0.9999
    exact = export_coreml(model, texts(2, 9), tmp_path / "fp32", shapes=RANGED).package
    program = MilOps(exact, batches[:1], probed(model, batches[0]))
    names = {op.name for op in program.ops}
    reference = program.run(0, names)
    for name in mended.half["kept_fp32"]:
        assert not compare(reference, program.run(0, names - {name})).right(), f"no set without {name} is right"


class OwnMask(nn.Module):
    """A mask as transformers wrote it for years: finfo.min + finfo.min is -inf, in fp32 too."""

    def __init__(self):
        super().__init__()
        self.llama = tiny("llama", "eager", use_cache=False)

    def forward(self, input_ids, attention_mask):
        least, places = torch.finfo(torch.float32).min, torch.arange(input_ids.shape[1])
        future = (places[None, :] > places[:, None]).float() * least
        padding = (1.0 - attention_mask[:, None, None, :].float()) * least
        return {"logits": self.llama(input_ids=input_ids, attention_mask=future[None, None] + padding).logits}


@pytest.mark.long
def test_a_left_padded_llama_with_a_mask_of_its_own_is_mended(tmp_path):
    """The export cannot make this mask finite: it is made in the model, from two products and their sum."""
    batches, model = left_padded(), OwnMask()
    assert not difference(model, plain(model, tmp_path / "plain"), batches[0]).finite, "NaN where tokens count"
    done = kept(model, tmp_path, batches)
    assert types_of(done) == ["add", "add", "mul", "mul", "softmax"], "the mask, one layer's scores, their softmax"
    assert casts_in(done.package) == done.half["float_casts"] == 4
    assert kept_in_fp32(done.half).endswith("; 4 float↔half casts")
    for batch in batches:
        assert difference(model, done.package, batch).cosine > 0.9999
    program = MilOps(
        export_coreml(model, texts(2, 9), tmp_path / "fp32", shapes=RANGED).package,
        batches[:1],
        probed(model, batches[0]),
    )
    names = {op.name for op in program.ops}
    reference = program.run(0, names)
    for name in done.half["kept_fp32"]:
        assert not compare(reference, program.run(0, names - {name})).right(), f"no set without {name} is right"


@pytest.mark.long
def test_a_harmless_model_stays_in_half(tmp_path):
    done = kept(small("bert"), tmp_path)
    assert done.half["kept_fp32"] == {} and done.half["said"] == "0 ops in FP32; 0 float↔half casts"


def test_a_package_that_stays_wrong_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(convert, "spellings", lambda name: set())
    with pytest.raises(ExportError, match="the fp16 package is wrong on the calibration batches"):
        kept(UForm(), tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_of_the_file_and_of_the_conversion():
    assert {"348", "op_348", "var_348"} <= spellings("348")
    assert {"var_348", "348"} <= spellings("var_348") and "x.1" in spellings("x_1")
