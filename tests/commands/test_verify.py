"""`mptrain verify` of packages as people make them: pictures with a scale and a bias, class labels, other names."""

from __future__ import annotations

import gc
import warnings

import coremltools as ct
import pytest
import torch
from torch import nn

from mptrain.commands.verify import verify
from mptrain.core.errors import ExportError
from mptrain.mil.program import read_program

SCALE, BIAS = 1 / 51, [-1.5, -2.0, -2.5]


class Pictures(nn.Module):
    """Scores of pictures [batch, 3, height, width] of any size, values around 0."""

    def __init__(self, head: nn.Module | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, pixel_values):
        return {"logits": self.linear(self.conv(pixel_values).relu().mean((2, 3)))}


class Around(nn.Module):
    """What users wrap: a normalization in front, a softmax behind."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model, self.before, self.after = model, before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.model(self.before(x))["logits"])


class Normalize(nn.Module):
    def forward(self, x):
        return (x / 255 - torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.2]).reshape(
            3, 1, 1
        )


def saved(model, folder, picture, shape=(1, 3, 16, 16), name="pixel_values", **how):
    taken = ct.ImageType(name=name, shape=shape, **picture)
    example = torch.zeros(shape if isinstance(shape, tuple) else (1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = ct.convert(
            torch.jit.trace(model, example),
            inputs=[taken],
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            **how,
        )
        package.save(str(folder / "m.mlpackage"))
        del package
        gc.collect()
    return folder / "m.mlpackage"


SIZES = {
    "one": ((1, 3, 16, 16), [[1, 3, 16, 16]]),
    "range": (
        ct.Shape((1, 3, ct.RangeDim(16, 20, default=16), ct.RangeDim(16, 32, default=16))),
        [[1, 3, 16, 16], [1, 3, 18, 24], [1, 3, 20, 32]],
    ),
    "list": (ct.EnumeratedShapes([[1, 3, 16, 16], [1, 3, 24, 20]]), [[1, 3, 16, 16], [1, 3, 24, 20]]),
}


@pytest.mark.parametrize(("sizes", "colours"), [*((sizes, "RGB") for sizes in SIZES), ("one", "BGR")])
def test_the_model_is_given_pixels_times_scale_plus_bias(sizes, colours, tmp_path):
    model, (shape, runs) = Pictures().eval(), SIZES[sizes]
    picture = dict(scale=SCALE, bias=BIAS, color_layout=getattr(ct.colorlayout, colours))
    package = saved(Around(model).eval(), tmp_path, picture, shape, outputs=[ct.TensorType(name="logits")])
    found = verify(package, model=model)
    assert found["passed"] and found["parity"]["limit"] == 1e-4 and found["parity"]["error"] < 1e-5
    assert sorted(run["shapes"]["pixel_values"] for run in found["runs"]) == runs
    said = f"pixels 0..255 ({colours}) × 0.01961 + [-1.5, -2, -2.5]"
    assert found["parity"]["model_reads"] == {"pixel_values": said}
    assert read_program(package).inputs[0].picture == colours and f"picture {colours}" in found["inputs"][0]
    with torch.no_grad():
        model.conv.weight[0] *= 1.01
    assert not verify(package, model=model)["passed"]


def test_a_normalization_inside_the_package_is_seen_under_other_names(tmp_path):
    model = Pictures().eval()
    model.main_input_name = "pixel_values"
    package = saved(Around(model, Normalize()).eval(), tmp_path, {}, name="image")
    found = verify(package, model=model)
    assert found["passed"] and found["parity"]["error"] < 1e-5
    assert found["parity"]["model_reads"]["image"].startswith("pixels 0..255 (RGB) × 0.003922 ")
    with torch.no_grad():
        model.linear.weight[0] *= 1.01
    assert not verify(package, model=model)["passed"]


@pytest.mark.parametrize("labels", [["ant", "bee", "cat", "dog"], [7, 3, 5, 9]])
@pytest.mark.parametrize("after", [nn.Softmax(-1), nn.Identity()])
def test_class_labels(labels, after, tmp_path):
    model = Pictures().eval()
    how = dict(classifier_config=ct.ClassifierConfig(labels))
    package = saved(Around(model, after=after).eval(), tmp_path, dict(scale=SCALE, bias=BIAS), **how)
    found = verify(package, model=model)
    assert found["passed"] and found["parity"]["error"] < 1e-5 and found["classes"] == labels
    with torch.no_grad():
        model.linear.weight[0] *= 1.01
    assert not verify(package, model=model)["passed"]


def test_labels_in_another_order_than_the_models_are_said(tmp_path):
    model = Pictures().eval()
    model.config = type("Config", (), {"id2label": dict(enumerate(["ant", "cat", "bee", "dog"]))})()
    how = dict(classifier_config=ct.ClassifierConfig(["ant", "bee", "cat", "dog"]))
    found = verify(saved(Around(model).eval(), tmp_path, dict(scale=SCALE, bias=BIAS), **how), model=model)
    differ = [(odd["class"], odd["package"], odd["model"]) for odd in found["parity"]["labels_differ"]]
    assert differ == [(1, "bee", "cat"), (2, "cat", "bee")]

    model.linear = nn.Linear(8, 5)
    with pytest.raises(ExportError, match=r"4 classes, the model gives \{'logits': \[1, 5\]\}"):
        verify(tmp_path / "m.mlpackage", model=model)


def test_a_model_of_other_inputs_is_named(tmp_path):
    class Words(nn.Module):
        def forward(self, input_ids):
            return {"logits": input_ids.float()}

    model = Pictures().eval()
    package = saved(Around(model).eval(), tmp_path, {}, outputs=[ct.TensorType(name="logits")])
    with pytest.raises(ExportError, match=r"\['pixel_values'\], of which the source model takes no .* \['input_ids'\]"):
        verify(package, model=Words())
    model.conv = nn.Conv2d(4, 8, 3)
    with pytest.raises(ExportError, match=r"the package's sizes \{'pixel_values': \[1, 3, 16, 16\]\}"):
        verify(package, model=model)
