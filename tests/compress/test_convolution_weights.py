"""Integer weights of convolutions: which, on which rows and blocks, and calibrated on what they see."""

import pytest
import torch
from kit.convolutions import mixed, pictures
from torch import nn

from mptrain.compress.calibrate.layerwise import walk
from mptrain.compress.calibrate.unfolded import products
from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.coverage import coverage
from mptrain.core.errors import UserError
from mptrain.models import artifact
from mptrain.recipe import WeightOnly

CONVOLUTIONS = ("stem.0", "block.depth", "block.point", "grouped", "along")
ROWS = {"bits": 8, "granularity": "channel"}


def config(**settings):
    return WeightOnly.model_validate({"mode": "weight_only", "method": "rtn", "block_size": "auto", **settings})


def compressed(**settings):
    model = mixed()
    weight_only.compress(model, config(**settings), [pictures(8, seed) for seed in range(4)])
    return model, records.of(model)


def test_all_are_covered_a_scale_to_an_output_channel():
    model, found = compressed()
    assert {name.removesuffix(".weight") for name in found} == {*CONVOLUTIONS, "classifier"}
    for name in CONVOLUTIONS:
        weight, record = model.get_parameter(f"{name}.weight"), found[f"{name}.weight"]
        assert record.bits == 8 and record.scale.shape == (len(weight), 1) and record.block_size == weight[0].numel()
    assert found["classifier.weight"].bits == 4 and found["classifier.weight"].block_size == 32
    share = coverage(model, found)
    weights = sum(model.get_parameter(name).numel() for name in found)
    assert share.share == weights / sum(p.numel() for p in model.parameters())
    assert set(share.left) == {"BatchNorm2d.weight", "BatchNorm2d.bias", *(f"{kind}.bias" for kind in
                               ("Linear", "Conv1d", "Conv2d"))}  # fmt: skip


def test_rows_of_blocks_are_channels_and_kernel():
    """The integers of each block of 32 columns, by hand."""
    model, found = compressed(convolutions="same")
    assert {n: (r.bits, r.block_size) for n, r in found.items()} == {
        "stem.0.weight": (4, 27), "block.depth.weight": (4, 9), "block.point.weight": (4, 32),
        "grouped.weight": (4, 16), "along.weight": (4, 64), "classifier.weight": (4, 32),
    }  # fmt: skip
    weight = mixed().grouped.weight.detach()
    units = weight.reshape(64, 9, 16)
    scale = (units.abs().amax(2) / 7).half().float()
    q = (units / scale[..., None]).round().clamp(-8, 7)
    assert torch.equal(found["grouped.weight"].q, q.reshape(64, 144).to(torch.int8))
    assert torch.equal(model.grouped.weight, (q * scale[..., None]).view_as(weight))
    with pytest.raises(UserError, match=r"stem\.0\.weight: block_size 32 does not divide 27 columns"):
        weight_only.compress(mixed(), config(convolutions="same", block_size=32))


def test_what_is_left_alone_is_said():
    with pytest.raises(UserError, match=r"left in floating point: Conv2d\.weight [0-9.]+%, Conv1d\.weight"):
        weight_only.compress(mixed(), config(convolutions="fp32"))
    model = mixed()
    model.back = nn.ConvTranspose2d(32, 64, 3)  # whose rows are inputs
    weight_only.compress(model, config(allow_partial=True))
    found = records.of(model)
    assert "back.weight" not in found and "ConvTranspose2d.weight" in coverage(model, found).left


def test_overrides_speak_of_them_too():
    _, found = compressed(overrides={"grouped": {"bits": 4, "granularity": "block", "block_size": 48}})
    assert (found["grouped.weight"].bits, found["grouped.weight"].block_size) == (4, 48)
    assert found["along.weight"].bits == 8


LAYERS = {
    "padding, stride": nn.Conv2d(4, 6, 3, 2, 1),
    "dilation, rectangle": nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (2, 1)),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "reflected": nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "same, circular": nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular"),
    "along": nn.Conv1d(4, 6, 5, 2, 3, 2, groups=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_moments_give_the_size_of_its_outputs(layer):
    """Σ_places |W x|² = tr(W H Wᵀ), of each output channel."""
    shape = (3, 4, 9) if isinstance(layer, nn.Conv1d) else (3, 4, 9, 7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = list(products(layer, x, None))
    count, h = sum(n for n, _ in parts), sum(product for _, product in parts)
    with torch.no_grad():
        outputs = (layer(x) - layer.bias.view(-1, *[1] * (x.dim() - 2))).transpose(0, 1).flatten(1)
        rows = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
        told = torch.einsum("goi,gij,goj->go", rows, h.expand(layer.groups, *h.shape[-2:]), rows).flatten()
    assert count == outputs.shape[1]
    torch.testing.assert_close(told, outputs.square().sum(1), rtol=1e-4, atol=1e-4)


def test_layers_that_see_the_same_share_their_moments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, pixel_values):
            return self.a(pixel_values).mean() + self.b(pixel_values).mean() + self.c(pixel_values).mean()

    (found,) = walk(Two().eval(), {"a", "b", "c"}, [pictures()])
    assert found["a"] is found["b"] and found["a"] is not found["c"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_and_scales_leave_less_of_the_error_of_every_layer(symmetric):
    """Of each convolution on what it sees in the float model: rounding, scales for these inputs, GPTQ for them."""
    batches = [pictures(8, seed) for seed in range(4)]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in CONVOLUTIONS}
    model = mixed()
    for name in CONVOLUTIONS:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model = mixed()

    def errors(method):
        rounded, _ = compressed(method=method, convolutions="same", symmetric=symmetric)
        with torch.no_grad():
            return {
                name: sum(
                    float((rounded.get_submodule(name)(x) - model.get_submodule(name)(x)).square().sum())
                    for x in seen[name]
                )
                for name in CONVOLUTIONS
            }

    nearest, scaled, compensated = errors("rtn"), errors("scale"), errors("gptq")
    for name in CONVOLUTIONS:
        assert compensated[name] < scaled[name] < nearest[name], name
    assert compensated["grouped"] < 0.6 * nearest["grouped"]


def test_one_scale_for_groups_is_not_what_gptq_can_do():
    with pytest.raises(UserError, match=r"block\.depth\.weight: gptq rounds each of the 32 groups .*method scale"):
        compressed(method="gptq", granularity="tensor", convolutions="same")
    _, found = compressed(method="scale", granularity="tensor", convolutions="same")
    assert found["block.depth.weight"].scale.shape == (1, 1)


def test_a_budget_counts_them():
    def loss(model, batch):
        labels = batch["labels"]
        return nn.functional.cross_entropy(model(batch["pixel_values"]), labels)

    model = mixed()
    labelled = [pictures(8, seed) | {"labels": torch.arange(8) % 5} for seed in range(2)]
    weight_only.compress(model, config(**ROWS, size_budget=6, convolutions="same"), (), labelled, loss_fn=loss)
    found = records.of(model)
    assert {record.bits for record in found.values()} == {4, 8}
    weights = sum(record.q.numel() for record in found.values())
    assert sum(map(records.stored_bytes, found.values())) <= 6 / 8 * weights


def test_they_are_saved_as_integers_and_read_again(tmp_path):
    from transformers import AutoModelForImageClassification, ResNetConfig

    model = AutoModelForImageClassification.from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    ).eval()
    weight_only.compress(model, config(**ROWS))
    artifact.save(model, tmp_path / "model", None)
    read = artifact.load(tmp_path / "model").eval()
    assert records.of(read).keys() == records.of(model).keys()
    with torch.no_grad():
        assert torch.equal(read(**pictures()).logits, model(**pictures()).logits)
