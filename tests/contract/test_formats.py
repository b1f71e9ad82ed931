"""What must hold for every row of EXPORTS and FORMATS: a format that passes here works in flow and report."""

from __future__ import annotations

import ast
import copy
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from kit.convolutions import mixed, pictures
from kit.long import except_for
from kit.tiny_models import inputs, tiny
from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import records, weight_only
from mptrain.core.errors import ExportError, MptrainError
from mptrain.core.signature import BATCH, Port, Signature, probed
from mptrain.export.base import Source
from mptrain.export.formats import FORMATS, format_of
from mptrain.recipe import EXPORTS, Qat, WeightOnly
from mptrain.recipe.exports.base import Use
from mptrain.recipe.stage import Stage
from mptrain.verify import parity

CASES = [(name, precision) for name in FORMATS for precision in ("fp32", "fp16")]
SIZED = {"coreml"}  # formats whose entry gives the range of lengths; the model reads 40 tokens
_folders: list[TemporaryDirectory] = []


def spec_of(name, **fields):
    sizes = {"shapes": {"kind": "ranged", "batch": [1, 8], "length": [1, 40]}} if name in SIZED else {}
    return EXPORTS[name].model_validate({"id": "x", "format": name, "of": ["model"], **sizes, **fields})


def source_of(model, batch, precision="fp32", signature=None, quantized=False) -> Source:
    signature = probed(model, batch) if signature is None else signature
    return Source(lambda: model, signature, batch, precision, "fp32", quantized, lambda: [batch])


def written(name, source, **fields):
    """(format, what it wrote into an empty folder)."""
    _folders.append(TemporaryDirectory())
    folder, kind = Path(_folders[-1].name), format_of(spec_of(name, **fields))
    found = kind.write(source, folder)
    return kind, found, folder


class Plain(nn.Module):
    """No model of transformers: class logits [b, 16] beside spans [b, tokens]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.classes, self.span = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(8, 1)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * attention_mask[..., None]
        return {"logits": self.classes(x.mean(1)), "start_logits": self.span(x)[..., 0], "hidden": x}


SIGNATURE = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("attention_mask", (BATCH, "tokens"), "int64")),
    (Port("logits", (BATCH, 16)), Port("start_logits", (BATCH, "tokens"))),
)


def texts(rows, length, padded=3):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -padded:] = 0
    generator = torch.Generator().manual_seed(rows * 100 + length)
    return {"input_ids": torch.randint(1, 40, (rows, length), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("name", FORMATS)
def test_both_halves_have_the_name(name):
    assert EXPORTS[name].name() == name and EXPORTS.keys() == FORMATS.keys()
    assert EXPORTS[name].title != "another format" and EXPORTS[name].packages and EXPORTS[name].extra
    assert isinstance(EXPORTS[name].timed, bool)
    EXPORTS[name].check_installed()


@pytest.mark.parametrize(
    ("name", "precision"), except_for(CASES, [case for case in CASES if case[1] == "fp32" or case[0] == "openvino"])
)
def test_a_model_is_written_opened_and_computes_the_same_at_other_sizes(name, precision):
    model, batch = tiny("bert"), inputs("bert")
    source = source_of(model, batch, precision)
    kind, found, folder = written(name, source)
    assert kind.torch(model, precision, "fp32") is model
    assert found.path.exists() and found.path.parent == folder
    assert found.size_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), (
        "no files but the model's"
    )
    assert (found.facts.half is not None) == (precision == "fp16")
    with closing(kind.open(found.path, replace(source, written=found.facts))) as runner:
        others = [inputs("bert", seed=3), {n: v[:1, :5] for n, v in batch.items()}]
        compared = parity.compare(model, runner, others)
        facts = runner.facts() | found.facts
    assert compared["max_abs_diff"] < (2e-5 if precision == "fp32" else 5e-3) and compared["examples"] == 4
    assert sum(facts.weight_types.values()) > 0 and facts.inference_precision
    assert facts.exact(precision) == (precision == "fp32")
    assert json.loads(json.dumps(facts.as_json())) and type(facts).from_json(facts.as_json()) == facts
    if "fused_attention" in EXPORTS[name].checks:
        assert facts.fused_attention == facts.attention_layers == 2


@pytest.mark.parametrize("name", FORMATS)
def test_a_plain_module_keeps_its_padding_out_and_its_classes_whole(name):
    """Class logits [b, 16] of a batch of 16 tokens are no tokens; span logits [b, 16] are, and lose what is padded."""
    model = Plain().eval()
    kind, found, _ = written(name, source := source_of(model, texts(3, 9), signature=SIGNATURE))
    with closing(kind.open(found.path, source)) as runner:
        batch = texts(3, 16)
        got = runner(batch)
        assert set(got) == {"logits", "start_logits"}, "outputs that do not count are not exported"
        compared = parity.compare(model, runner, [batch], signature=SIGNATURE)
        assert compared["max_abs_diff"] < 1e-5

        def changed(output, column):
            def forward(given):
                outputs = {n: v.copy() for n, v in runner(given).items()}
                outputs[output][0, column] += 1
                return outputs

            return parity.compare(model, forward, [batch], signature=SIGNATURE)["max_abs_diff"]

        assert changed("logits", 15) > 0.9, "the last class counts, also in the row whose 16th token is padding"
        assert changed("start_logits", 15) < 1e-5 and changed("start_logits", 0) > 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_keeps_its_size(name):
    model, batch = tiny("vit"), inputs("vit")
    kind, found, _ = written(name, source := source_of(model, batch))
    with closing(kind.open(found.path, source)) as runner:
        assert parity.compare(model, runner, [inputs("vit", seed=5)])["max_abs_diff"] < 2e-5


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_are_stored_once_copied_and_what_is_dropped_is_said(name, monkeypatch):
    plain, batch = tiny("bert"), inputs("bert")
    model = quantizers.quantize(plain, Qat(mode="qat"), [batch])
    spec = spec_of(name)
    stage = Stage.model_validate({"id": "q", "quantize": {"mode": "qat"}, "train": {"epochs": 1, "lr": 1e-3}})
    precision = "int8" if "int8" in spec.precisions(stage) else "fp32"
    kind = format_of(spec)
    copied, deepcopy = [], copy.deepcopy

    def counted(x, *memo):  # with a memo it is a part of one that is copied already, as a bound method's model is
        copied.extend([x] if isinstance(x, type(model)) and not memo else [])
        return deepcopy(x, *memo)

    with monkeypatch.context() as patched:
        patched.setattr(copy, "deepcopy", counted)
        taken = kind.torch(model, precision, "int8")
        source = replace(source_of(taken, batch, precision, quantized=True), embeddings="int8")
        kind, found, _ = written(name, source)
    assert len(copied) == 1, "one more copy of a large model decides whether it fits"
    with closing(kind.open(found.path, source)) as runner:
        facts = runner.facts() | found.facts
        assert parity.compare(taken, runner, [batch])["agreement"] == 1
    assert sum(size for kind_, size in facts.weight_types.items() if "8" in kind_) > 8000, facts.weight_types
    stored = [spec.stores(weights) for _, weights in stage.leaves()]
    assert all(found.result == "stored" for found in stored)
    assert (facts.dropped is None) == (precision == "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_int4_blocks_are_stored(name):
    model, batch = tiny("bert"), inputs("bert")
    settings = WeightOnly(mode="weight_only", method="rtn", bits=4, block_size=16)
    weight_only.compress(model, settings, [])
    spec = spec_of(name)
    stage = Stage.model_validate({"id": "w", "quantize": settings.model_dump()})
    precision = spec.precisions(stage)[0]
    source = source_of(format_of(spec).torch(model, precision, "fp32"), batch, precision)
    kind, found, _ = written(name, source)
    with closing(kind.open(found.path, source)) as runner:
        assert parity.compare(model, runner, [batch])["max_abs_diff"] < 1e-4
        assert any("4" in stored for stored in runner.facts().weight_types)


ROWS = {"bits": 8, "granularity": "channel"}
BLOCKS = {"bits": 4, "block_size": "auto", "convolutions": "same"}
CONVOLUTIONS = {
    "a scale to a row": ROWS,
    "zero points": ROWS | {"symmetric": False, "convolutions": "same"},
    "blocks": BLOCKS,
    "blocks with zero points": BLOCKS | {"symmetric": False},
}


@pytest.mark.parametrize(
    ("name", "case"),
    except_for([(n, c) for n in FORMATS for c in CONVOLUTIONS], [(n, "a scale to a row") for n in FORMATS]),
)
def test_weights_of_convolutions_are_stored_also_before_a_batch_norm(name, case):
    """Or are refused by the entry. All that the file holds: integers, their scales, and the floats that are left."""
    model, batch, spec = mixed(), pictures(), spec_of(name)
    config = WeightOnly(mode="weight_only", method="rtn", **CONVOLUTIONS[case])
    weight_only.compress(model, config)
    stage = Stage.model_validate({"id": "w", "quantize": config.model_dump()})
    results = {spec.stores(weights).result for _, weights in stage.leaves()}
    if "refused" in results:
        assert name == "coreml" and case.startswith("blocks")
        return
    precision = spec.precisions(stage)[0]
    source = source_of(format_of(spec).torch(model, precision, "fp32"), batch, precision)
    kind, found, _ = written(name, source)
    with closing(kind.open(found.path, source)) as runner:
        assert parity.compare(model, runner, [pictures(seed=7)])["max_abs_diff"] < 1e-5
        types = runner.facts().weight_types
    held = records.distinct(records.of(model))
    integers = sum(record.q.numel() * record.bits / 8 for record in held.values())
    stored = sum(size for type_, size in types.items() if str(config.bits) in type_.lstrip("floatF"))
    assert integers <= stored < 1.15 * integers, types
    scales = sum(record.scale.numel() for record in held.values())
    floats = sum(t.numel() for n, t in model.state_dict().items() if n not in held and t.is_floating_point())
    assert sum(types.values()) < 1.15 * integers + 4 * (scales + 2 * floats)
    assert [type(m) for m in model.modules()] == [type(m) for m in mixed().modules()], "the model is as it was"


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused(name):
    model, batch = tiny("bert"), inputs("bert")
    kind, found, folder = written(name, source := source_of(model, batch))
    files = [file for file in folder.rglob("*") if file.is_file() and "debug" not in file.name]
    for file in files:  # one at a time
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MptrainError), closing(kind.open(found.path, source)) as runner:
            runner(batch)
        file.write_bytes(whole)
    with closing(kind.open(found.path, source)) as runner:
        runner(batch)


@pytest.mark.parametrize("name", FORMATS)
def test_how_a_user_loads_it_is_python(name):
    use = Use("f/model", "f", "text-classification", "AutoTokenizer", "OVModelForSequenceClassification", '"text"', 128)
    for found in (use, replace(use, optimum=None), replace(use, processor=None, optimum=None, pipeline=None)):
        lines = EXPORTS[name].loading(found)
        text = "\n".join(lines)
        assert lines and ast.parse(text) and (repr(found.path) in text or repr(found.folder) in text)


def test_outputs_that_are_missing_or_not_finite_are_errors():
    model, batch = Plain().eval(), texts(2, 8)
    with torch.no_grad():
        whole = {name: value.numpy() for name, value in model(**batch).items()}
    with pytest.raises(ExportError, match=r"lacks \['start_logits'\]"):
        parity.compare(model, lambda _: {"logits": whole["logits"]}, [batch], signature=SIGNATURE)
    broken = whole | {"start_logits": np.full_like(whole["start_logits"], np.nan)}
    with pytest.raises(ExportError, match="13 of 13 values of the exported model are not finite"):
        parity.compare(model, lambda _: broken, [batch], signature=SIGNATURE)
