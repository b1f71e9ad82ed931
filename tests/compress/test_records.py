import json

import numpy as np
import pytest
import torch
import transformers as t
from kit.records import palettized, quantized
from kit.tiny_models import inputs, logits, tiny
from safetensors.torch import load_file, save_file
from torch import nn

import mptrain
from mptrain.compress.weights import records
from mptrain.compress.weights.records import BlockQuantized, Palettized
from mptrain.core.errors import ModelError


def one_by_one(record):
    """The formulas of records.py, an element at a time."""
    weight = np.zeros(record.shape, np.float32)
    for i, j in np.ndindex(*record.shape):
        if isinstance(record, Palettized):
            index = int(record.indices[i, j // record.cluster_dim])
            weight[i, j] = record.lut[i // record.rows_per_group, index, j % record.cluster_dim]
            if record.per_channel_scale is not None:
                weight[i, j] *= record.per_channel_scale[i, 0]
        else:
            at = (i if len(record.scale) > 1 else 0, j // record.block_size)
            zero = 0 if record.zero is None else int(record.zero[at])
            weight[i, j] = np.float32(int(record.q[i, j]) - zero) * record.scale[at].numpy()
    return torch.from_numpy(weight)


CASES = [
    quantized(5, 12),
    quantized(5, 12, scales=(5, 1), bits=8, half=False),
    quantized(5, 12, scales=(5, 3), zero=True),
    quantized(5, 12, scales=(1, 4), signed=False, zero=True, bits=3),
    quantized(5, 12, scales=(5, 12), signed=False, zero=True, bits=8),
    palettized(5, 12),
    palettized(5, 12, per_group=5, bits=1),
    palettized(5, 12, per_group=1, bits=8, scaled=True),
    palettized(5, 12, dim=4, bits=6, scaled=True),
]


@pytest.mark.parametrize("record", CASES)
def test_dense_is_the_formula(record):
    assert torch.equal(record.dense(), one_by_one(record))


def test_a_file_holds_every_bit(tmp_path):
    before = {f"layer.{i}.weight": record for i, record in enumerate(CASES)}
    records.write(tmp_path / "r", before)
    after = records.read(tmp_path / "r")
    assert list(after) == list(before)
    for name, record in before.items():
        for part, value in vars(record).items():
            again = getattr(after[name], part)
            if isinstance(value, torch.Tensor):
                assert again.dtype == value.dtype and torch.equal(again, value)
            else:
                assert again == value


def test_stored_bytes_is_what_the_file_takes(tmp_path):
    """Counted by hand for one record of each kind, then for all against the tensors of the file."""
    assert records.stored_bytes(quantized(5, 12, scales=(5, 3), zero=True)) == 30 + 2 * 15 + 8
    assert records.stored_bytes(quantized(5, 12, scales=(5, 1), bits=8, half=False)) == 60 + 4 * 5
    assert records.stored_bytes(palettized(5, 12, bits=3)) == 23 + 2 * 2 * 8
    for record in CASES:
        records.write(tmp_path / "r", {"w": record})
        assert sum(v.nbytes for v in load_file(tmp_path / "r").values()) == records.stored_bytes(record)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: quantized(4, 10, scales=(4, 3)), "equal blocks"),
        (lambda: quantized(4, 12, scales=(2, 3)), "equal blocks"),
        (lambda: BlockQuantized(torch.full((2, 2), 8, dtype=torch.int8), torch.ones(1, 1), None, 4), "-8 … 7"),
        (lambda: BlockQuantized(torch.zeros(2, 2), torch.ones(1, 1), None, 4), "int8 or uint8"),
        (lambda: BlockQuantized(torch.zeros(2, 2, dtype=torch.int8), torch.tensor([[torch.nan]]), None, 4), "finite"),
        (lambda: Palettized(torch.full((2, 2), 2, dtype=torch.uint8), torch.ones(1, 2, 1), 2, None, 1), "0 … 1"),
        (lambda: Palettized(torch.zeros(4, 2, dtype=torch.uint8), torch.ones(3, 2, 1), 2, None, 1), "3 tables"),
    ],
)
def test_a_record_that_cannot_be(make, problem):
    with pytest.raises(ModelError, match=problem):
        make()


# -- on a model


def compressed(family="bert", **arguments):
    model = tiny(family, **arguments)
    new = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, columns = module.weight.shape
            make = palettized if index % 2 else quantized
            new[f"{name}.weight"] = make(rows, columns, seed=index)
    if family == "opt":
        del new["lm_head.weight"]
    records.attach(model, new)
    return model, new


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_attach_sets_the_weights(family):
    model, new = compressed(family)
    for name, record in new.items():
        assert torch.equal(model.get_parameter(name), record.dense())
        assert records.of(model)[name] is record
    assert set(records.distinct(records.of(model))) == set(new)


def test_a_convolution_is_flattened():
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    record = quantized(4, 18, scales=(4, 1))
    records.attach(model, {"0.weight": record})
    assert torch.equal(model[0].weight.flatten(1), record.dense())
    assert records.of(model) == {"0.weight": record}


def test_tied_weights_have_one_record():
    model = tiny("opt")
    record = quantized(50, 32)
    records.attach(model, {"lm_head.weight": record})
    assert records.of(model) == {"model.decoder.embed_tokens.weight": record, "lm_head.weight": record}
    assert list(records.distinct(records.of(model))) == ["model.decoder.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    names = ("lm_head.weight", "model.decoder.embed_tokens.weight")
    with pytest.raises(ModelError, match="tied"):
        records.attach(tiny("opt"), {name: quantized(50, 32) for name in names})


def test_a_weight_that_was_changed_is_noticed(tmp_path):
    model, _ = compressed()
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    for use in (records.of, lambda m: mptrain.save(m, tmp_path / "m")):
        with pytest.raises(ModelError, match=r"classifier\.weight was changed after its compression"):
            use(model)
    assert not (tmp_path / "m").exists()
    model, _ = compressed()
    with pytest.raises(ModelError, match="changed"):
        records.of(model.half())


def test_what_does_not_fit_is_refused():
    model = tiny("bert")
    for name, record, problem in [
        ("nowhere.weight", quantized(3, 32), "no parameter"),
        ("classifier.weight", quantized(4, 32), r"\(3, 32\)"),
    ]:
        with pytest.raises(ModelError, match=problem):
            records.attach(model, {name: record})
    with pytest.raises(ModelError, match=r"model\.float"):
        records.attach(model.half(), {"classifier.weight": quantized(3, 32)})


# -- as an artifact


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_an_artifact_keeps_them(family, tmp_path):
    model, new = compressed(family)
    expected = logits(model, inputs(family))
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert torch.equal(logits(loaded, inputs(family)), expected)
    found = records.distinct(records.of(loaded))
    assert set(found) == set(new)
    for name, record in new.items():
        for part, value in vars(record).items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(getattr(found[name], part), value)
    assert not set(new) & set(load_file(tmp_path / "m/mptrain.safetensors"))
    mptrain.save(loaded, tmp_path / "again")
    assert (
        load_file(tmp_path / "again/compressed.safetensors").keys()
        == load_file(tmp_path / "m/compressed.safetensors").keys()
    )


def test_from_pretrained_never_gives_random_layers(tmp_path):
    model, _ = compressed()
    mptrain.save(model, tmp_path / "m")
    for arguments in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises((ValueError, OSError), match=r"QUANTIZED BY MPTRAIN.*mptrain\.load"):
            t.BertForSequenceClassification.from_pretrained(tmp_path / "m", **arguments)
    remote = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert torch.equal(logits(remote.eval(), inputs("bert")), logits(model, inputs("bert")))


@pytest.mark.parametrize("damage", ["cut", "gone", "version", "part"])
def test_a_damaged_folder(damage, tmp_path):
    model, _ = compressed()
    mptrain.save(model, tmp_path / "m")
    path = tmp_path / "m/compressed.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "gone":
        path.unlink()
    elif damage == "version":
        save_file({}, path, {"records": json.dumps({"version": 9, "weights": {}})})
    else:
        tensors = load_file(path)
        tensors.pop("classifier.weight:scale", None) or tensors.pop("classifier.weight:lut")
        with records.safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
    with pytest.raises(ModelError, match=r"damaged|missing|version|do not fit"):
        mptrain.load(tmp_path / "m")
