import json
import pickle
import sys
import textwrap

import pytest
import torch
import transformers as t
from kit.structures import keep
from kit.tiny_models import FAMILIES, RELATIVES, inputs, logits, tiny
from safetensors.torch import load_file, save_file

import mptrain
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink, slices_of
from mptrain.core.errors import ModelError, UserError
from mptrain.models import artifact
from mptrain.recipe import Qat

ATTENTION = "bert.encoder.layer.0.attention.self"
QUERY = f"{ATTENTION}.query.weight"
AUTO = {
    "vit": t.AutoModelForImageClassification,
    "swin": t.AutoModelForImageClassification,
    "wav2vec2": t.AutoModelForAudioClassification,
    "opt": t.AutoModelForCausalLM,
    "llama": t.AutoModelForCausalLM,
}


def auto(family):
    family = {"deit": "vit", "hubert": "wav2vec2"}.get(family, family)
    return AUTO.get(family, t.AutoModelForSequenceClassification)


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path_factory, monkeypatch):
    """transformers copies the code of a folder into a cache; not into the user's."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])


def pruned(family, **arguments):
    model = tiny(family, **arguments)
    structure = find_structure(model)
    kept = keep(structure, {0: [1]}, {i: list(range(0, f.units, 3)) for i, f in enumerate(structure.of_kind("ffn"))})
    return shrink(model, structure, kept)


def quantized(model):
    return quantizers.quantize(model, Qat.model_validate({"mode": "qat"}), [inputs("bert", seed=i) for i in range(3)])


# -- round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_is_an_ordinary_folder(family, tmp_path):
    model = tiny(family)
    before = torch.get_rng_state()
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    attn = model.config._attn_implementation  # which an ordinary folder does not say: Swin's default changes with 5.23
    other = auto(family).from_pretrained(tmp_path / "m", attn_implementation=attn).eval()
    assert type(loaded) is type(other) is type(model) and not loaded.training
    expected = logits(model, inputs(family))
    assert torch.equal(logits(loaded, inputs(family)), expected)
    assert torch.equal(logits(other, inputs(family)), expected)


@pytest.mark.parametrize("make", [tiny, pruned])
def test_what_another_transformers_names_otherwise_is_said_with_its_version(make, tmp_path):
    mptrain.save(make("bert"), tmp_path / "m")
    file = tmp_path / "m/config.json"
    config = json.loads(file.read_text().replace("bert.encoder.layer.", "bert.layers."))
    for weights in (tmp_path / "m").glob("*.safetensors"):
        renamed = {n.replace("bert.encoder.layer.", "bert.layers."): w for n, w in load_file(weights).items()}
        save_file(renamed, weights, {"format": "pt"})
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError) as same:
        mptrain.load(tmp_path / "m")
    assert "pip install" not in str(same.value)
    file.write_text(json.dumps(config | {"transformers_version": "5.0.1"}))
    with pytest.raises(ModelError, match=r"saved with transformers 5\.0\.1, .*pip install 'transformers==5\.0\.1'"):
        mptrain.load(tmp_path / "m")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_a_pruned_model(family, attn, tmp_path):
    model = pruned(family, attn=attn)
    expected = logits(model, inputs(family))
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert torch.equal(logits(loaded, inputs(family)), expected)
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert loaded.config.mptrain_structure == model.config.mptrain_structure
    assert not hasattr(loaded.config, "auto_map") and not hasattr(loaded.config, "transformers_weights")

    for arguments in ({}, {"ignore_mismatched_sizes": True}, {"trust_remote_code": False}):
        for cls in (auto(family), type(model)):
            with pytest.raises((ValueError, OSError), match=r"PRUNED OR QUANTIZED BY MPTRAIN.*mptrain\.load"):
                cls.from_pretrained(tmp_path / "m", **arguments)

    remote = auto(family).from_pretrained(tmp_path / "m", trust_remote_code=True, attn_implementation="eager")
    assert isinstance(remote, type(model))
    torch.testing.assert_close(logits(remote.eval(), inputs(family)), expected, rtol=0, atol=1e-5)
    mptrain.save(remote, tmp_path / "again")
    torch.testing.assert_close(logits(mptrain.load(tmp_path / "again"), inputs(family)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "cls"),
    [
        ("bert", t.BertForTokenClassification),
        ("bert", t.BertForQuestionAnswering),
        ("bert", t.BertForMaskedLM),
        ("bert", t.BertModel),
        ("roberta", t.RobertaForCausalLM),
        ("vit", t.ViTModel),
    ],
)
def test_other_heads(family, cls, tmp_path):
    model = pruned(family, cls=cls, num_labels=2)
    mptrain.save(model, tmp_path / "m")
    with torch.no_grad():
        first, second = (m(**inputs(family))[0] for m in (model, mptrain.load(tmp_path / "m")))
    assert torch.equal(first, second)
    name = next(iter(json.loads((tmp_path / "m/config.json").read_text())["auto_map"]))
    remote = getattr(t, name).from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert isinstance(remote, cls)


def test_a_quantized_model(tmp_path):
    model = quantized(tiny("bert"))
    expected = logits(model, inputs("bert"))
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert quantizers.is_quantized(loaded)
    assert torch.equal(logits(loaded, inputs("bert")), expected)
    for arguments in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="QUANTIZED BY MPTRAIN"):
            t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", **arguments)
    remote = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert torch.equal(logits(remote.eval(), inputs("bert")), expected)


def test_a_pruned_and_quantized_model(tmp_path):
    model = quantized(tiny("bert"))
    structure = find_structure(model)
    assert structure == find_structure(tiny("bert"))  # hooks do not hide the layers
    kept = keep(structure, {0: [1, 2]}, {1: list(range(0, 48, 2))})
    plain, description, tensors = quantizers.detach(model)
    shrink(plain, structure, kept)
    description, tensors = quantizers.slice_quantizers(description, tensors, slices_of(structure, kept))
    model = quantizers.attach(plain, description, tensors).eval()
    expected = logits(model, inputs("bert"))
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert torch.equal(logits(loaded, inputs("bert")), expected)
    blocks = loaded.config.mptrain_structure["blocks"]
    assert blocks["bert.encoder.layer.0.attention"] == {"kind": "heads", "units": 2, "of": 4}
    mptrain.save(loaded, tmp_path / "again")
    assert torch.equal(logits(mptrain.load(tmp_path / "again"), inputs("bert")), expected)


def test_generation(tmp_path):
    model = pruned("opt")
    model.generation_config.max_new_tokens = 4
    model.generation_config.pad_token_id = 0
    mptrain.save(model, tmp_path / "m")
    ids = inputs("opt")["input_ids"]
    loaded = mptrain.load(tmp_path / "m")
    remote = t.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert torch.equal(loaded.generate(ids), model.generate(ids))
    assert torch.equal(remote.generate(ids), model.generate(ids))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = pruned("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    mptrain.save(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m/mptrain.safetensors")
    loaded = mptrain.load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    model = pruned("bert").to(dtype)
    model.bert.encoder.layer[0].output.LayerNorm.float()
    mptrain.save(model, tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m")
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))


def test_names_in_the_file_are_the_names_in_memory(tmp_path):
    """A checkpoint with LayerNorm.gamma and beta, as old BERTs have, comes out with weight and bias."""
    model = tiny("bert")
    mptrain.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for n, tensor in tensors.items()
    }
    assert set(old) != set(tensors)
    save_file(old, tmp_path / "m/model.safetensors", {"format": "pt"})
    loaded = t.BertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    mptrain.save(loaded, tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(tensors)
    assert torch.equal(logits(mptrain.load(tmp_path / "again"), inputs("bert")), logits(model, inputs("bert")))


def test_remote_code_stands_alone(tmp_path):
    """A pruned model's file needs nothing of mptrain, and refuses weights that do not fit."""
    mptrain.save(pruned("bert"), tmp_path / "m")
    code = (tmp_path / "m/modeling_mptrain.py").read_text()
    assert "@" not in code.replace("@classmethod", "")
    assert [line for line in code.splitlines() if line.startswith(("import", "from"))] == [
        "import os",
        "import torch",
        "from torch import nn",
        "from transformers import BertForSequenceClassification as Base",
    ]
    tensors = load_file(tmp_path / "m/mptrain.safetensors")
    tensors.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(tensors, tmp_path / "m/mptrain.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="do not fit"):
        t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", trust_remote_code=True)


# -- custom code


@pytest.fixture
def custom(tmp_path, monkeypatch):
    name = f"modeling_own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent("""
        from pathlib import Path
        from transformers import BertForSequenceClassification

        (Path(__file__).parent / "ran").touch()

        class OwnClassifier(BertForSequenceClassification):
            def forward(self, *args, **kwargs):
                outputs = super().forward(*args, **kwargs)
                outputs.logits = -2 * outputs.logits
                return outputs
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name).OwnClassifier


def test_custom_code_needs_permission(custom, tmp_path):
    model = pruned("bert", cls=custom)
    mptrain.save(model, tmp_path / "m")
    with pytest.raises(ModelError, match=r"OwnClassifier is not part of transformers.*--allow-code"):
        mptrain.load(tmp_path / "m")
    loaded = mptrain.load(tmp_path / "m", allow_code=True)
    assert torch.equal(logits(loaded, inputs("bert")), logits(model, inputs("bert")))
    mptrain.save(loaded, tmp_path / "again")
    again = mptrain.load(tmp_path / "again", allow_code=True)
    assert torch.equal(logits(again, inputs("bert")), logits(model, inputs("bert")))


def test_code_in_a_folder_does_not_run_by_itself(tmp_path):
    mptrain.save(pruned("bert"), tmp_path / "m")
    marker = tmp_path / "ran"
    (tmp_path / "m/modeling_mptrain.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for file in ("pytorch_model.bin", "training_args.bin", "mptrain.bin"):
        (tmp_path / "m" / file).write_bytes(pickle.dumps(_Touch(str(marker))))
    mptrain.load(tmp_path / "m")
    assert not marker.exists()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_only_whole_transformers_models_are_saved(tmp_path):
    with pytest.raises(ModelError, match="only transformers models"):
        mptrain.save(torch.nn.Linear(2, 2), tmp_path / "m")
    local = type("Local", (t.BertForSequenceClassification,), {"__module__": "__main__"})
    with pytest.raises(ModelError, match="defined in __main__"):
        mptrain.save(tiny("bert", cls=local), tmp_path / "m")
    assert not list(tmp_path.iterdir())


# -- whole or not at all


class _Processor:
    def __init__(self, fail=False):
        self.fail = fail

    def save_pretrained(self, folder):
        (folder / "processor.json").write_text("{}")
        if self.fail:
            raise OSError(28, "No space left on device")


def test_an_interrupted_save_leaves_the_old_model(tmp_path):
    first, second = pruned("bert"), pruned("bert", seed=1)
    mptrain.save(first, tmp_path / "m", _Processor())
    assert (tmp_path / "m/processor.json").is_file()
    with pytest.raises(OSError, match="No space"):
        mptrain.save(second, tmp_path / "m", _Processor(fail=True))
    assert torch.equal(logits(mptrain.load(tmp_path / "m"), inputs("bert")), logits(first, inputs("bert")))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / ".m.new").mkdir()  # what a killed process leaves
    mptrain.save(second, tmp_path / "m")
    assert torch.equal(logits(mptrain.load(tmp_path / "m"), inputs("bert")), logits(second, inputs("bert")))
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and not (tmp_path / "m/processor.json").exists()


def test_never_deletes_what_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model folder"):
        mptrain.save(tiny("bert"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- damaged and hostile folders


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("mptrain"),
        lambda c: c.update(mptrain=[]),
        lambda c: c.update(mptrain={"version": 99}),
        lambda c: c.update(architectures=None),
        lambda c: c.update(architectures=[]),
        lambda c: c.update(architectures=["Nope"]),
        lambda c: c.update(architectures=["os"]),
        lambda c: c.update(architectures=["AutoModel"]),
        lambda c: c.update(architectures=["BertConfig"]),
        lambda c: c.update(architectures=["../../x"]),
        lambda c: c.update(architectures=["PreTrainedModel"]),
        lambda c: c.update(architectures=["OPTForCausalLM"]),
        lambda c: c.update(architectures=["BertForTokenClassification"]),
        lambda c: c.update(hidden_size="wide"),
        lambda c: c.update(hidden_size=64),
        lambda c: c.update(num_hidden_layers=3),
        lambda c: c.update(vocab_size=10**15),
        lambda c: c.pop("mptrain_structure"),
        lambda c: c.update(mptrain_structure=None),
        lambda c: c.update(mptrain_structure="x"),
        lambda c: c["mptrain_structure"].update(version=3),
        lambda c: c["mptrain_structure"].update(version=4),
        lambda c: c["mptrain_structure"].pop("tensors"),
        lambda c: c["mptrain_structure"]["tensors"].pop(QUERY),
        lambda c: c["mptrain_structure"]["tensors"].update({QUERY: [16, 32]}),
        lambda c: c["mptrain_structure"]["tensors"].update({QUERY: [-8, 32]}),
        lambda c: c["mptrain_structure"]["tensors"].update({QUERY: [10**12, 32]}),
        lambda c: c["mptrain_structure"]["tensors"].update({QUERY: [8]}),
        lambda c: c["mptrain_structure"]["tensors"].update({QUERY: "8"}),
        lambda c: c["mptrain_structure"]["tensors"].update({"nowhere.weight": [8]}),
        lambda c: c["mptrain_structure"]["attributes"].update({"bert.nowhere": {"x": 1}}),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(num_attention_heads=-1),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(num_attention_heads=10**12),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(num_attention_heads=True),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(num_attention_heads=[1]),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(forward=1),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update(__class__=1),
        lambda c: c["mptrain_structure"]["attributes"][ATTENTION].update({"config.vocab_size": "x"}),
        lambda c: c["mptrain_structure"]["attributes"].update({ATTENTION: 3}),
        lambda c: c["mptrain"].update(attn=7),
        lambda c: c["mptrain"].update(attn="kernels-community/evil"),
    ],
)
def test_a_config_that_does_not_fit(change, tmp_path):
    mptrain.save(pruned("bert"), tmp_path / "m")
    edit(tmp_path / "m/config.json", change)
    with pytest.raises(ModelError) as caught:
        mptrain.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value) or "mptrain_structure" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "mptrain.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage"])
def test_a_damaged_file(file, damage, tmp_path):
    mptrain.save(pruned("bert"), tmp_path / "m")
    path = tmp_path / "m" / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff" * 100}[damage])
    with pytest.raises(ModelError, match=str(path)):
        mptrain.load(tmp_path / "m")


def test_weights_of_another_model(tmp_path):
    mptrain.save(pruned("bert"), tmp_path / "m")
    path = tmp_path / "m/mptrain.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.output.dense.weight"
    for wrong in (
        {n: v for n, v in tensors.items() if n != name},
        tensors | {"extra": torch.zeros(1)},
        tensors | {name: torch.zeros(3, 3)},
    ):
        save_file(wrong, path)
        with pytest.raises(ModelError, match="do not fit"):
            mptrain.load(tmp_path / "m")
    for aliases in ("[", "3", '{"a": "missing"}', '{"a": 1}'):
        save_file(tensors, path, {"aliases": aliases})
        with pytest.raises(ModelError, match="damaged"):
            mptrain.load(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(version=0),
        lambda q: q.pop("modules"),
        lambda q: q.update(modules=3),
        lambda q: q["modules"][0].update(kind="os.system"),
        lambda q: next(entry for entry in q["modules"] if "shape" in entry).update(shape="x"),
        lambda q: q["modules"][0].pop("at"),
        lambda q: q["modules"].pop(),
    ],
)
def test_quantizers_that_do_not_fit(change, tmp_path):
    mptrain.save(quantized(tiny("bert")), tmp_path / "m")
    edit(tmp_path / "m/quantizers.json", change)
    with pytest.raises(ModelError):
        mptrain.load(tmp_path / "m")


def test_not_a_folder(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        mptrain.load(tmp_path / "nowhere")
    tiny("bert").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="use from_pretrained"):
        mptrain.load(tmp_path / "theirs")


def test_public_names():
    assert mptrain.load is artifact.load and mptrain.save is artifact.save


def test_adapters_beside_the_weights_are_not_saved_as_if_they_were_the_model(tmp_path):
    """A folder with them would be written, and fit no model when it is read."""
    import peft

    model = tiny("bert")
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"])
    peft.inject_adapter_in_model(settings, model)  # what add_adapter of transformers does
    with pytest.raises(
        ModelError, match=r"layer\.0\.attention\.self\.query has adapters of peft, which no model folder"
    ):
        mptrain.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merged = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=2, target_modules=["query"])).merge_and_unload()
    mptrain.save(merged, tmp_path / "model")
    assert torch.equal(logits(mptrain.load(tmp_path / "model"), inputs("bert")), logits(merged.eval(), inputs("bert")))
