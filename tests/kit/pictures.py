"""A folder with a tiny random model of every architecture that transformers classifies pictures with.

Configs name no `image_size`, as those of ResNets do not: the size of a picture stands in the image processor beside
it. `NAMES` are model types; `save(name, folder)` makes the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from kit.architectures import ARCHITECTURES, OFF, PICTURES, SMALL

NAMES = sorted(CLASSES)
SIDE = 64  # of pictures, where the architecture reads any

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TWO = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16}
_OWN: dict[str, dict[str, Any]] = {
    **{
        name: {k: v for k, v in row[2].items() if k != "image_size"}
        for name, row in ARCHITECTURES.items()
        if row[0] == PICTURES
    },
    **{name: {"vision_config": {**_TOWER, "patch_size": 32}} for name in ("clip", "metaclip_2", "siglip")},
    "siglip2": {"vision_config": {**_TOWER, "patch_size": 8, "num_patches": 64}},
    **{name: {**_TWO, "window_size": 7} for name in ("swin", "swinv2", "donut-swin")},
    "dinat": {**_TWO, "kernel_size": 3, "dilations": [[1], [1]]},
    "hiera": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "num_query_pool": 1},
    "hgnet_v2": {
        **{"stem_channels": [3, 8, 12], "stage_in_channels": [12, 16], "stage_mid_channels": [8, 8]},
        **{"stage_out_channels": [16, 24], "stage_num_blocks": [1, 1], "stage_downsample": [False, True]},
        **{"stage_light_block": [False, True], "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2]},
        **{"embedding_size": 12, "depths": [1, 1], "hidden_sizes": [16, 24]},
    },
    "imagegpt": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 17},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "perceiver": {
        **{"num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1},
        **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2},
    },
    "pp_lcnet": {"scale": 0.25},
    "pvt_v2": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4]},
        **{"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    },
    "textnet": {"hidden_sizes": [16, 16, 16, 16, 16], "stem_out_channels": 16},
    "shieldgemma2": {
        "text_config": {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 99},
        },
        "vision_config": {**_TOWER, "patch_size": 32},
        **{"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 96, "eoi_token_index": 97},
    },
}


def save(name: str, folder: Path) -> Path:
    """Raises ImportError for an architecture whose package is not installed."""
    kind = type(AutoConfig.for_model(name))
    known = vars(kind())
    small = {k: v for k, v in SMALL.items() if k in known and k not in ("image_size", "patch_size")}
    patch = (
        {"patch_size": 32} if isinstance(known.get("image_size"), int) and known.get("patch_size") in (14, 16) else {}
    )
    config = kind(**{**small, **patch, **_OWN.get(name, {})})
    config.num_labels = 3
    for key, value in vars(config).items():
        if any(word in key for word in OFF) and isinstance(value, float):
            setattr(config, key, 0.0)
    found = CLASSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, found if isinstance(found, str) else found[0])(config)
    model.eval().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    _forget(written)
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(config)))
    return folder


def _forget(written: dict[str, Any]) -> None:
    written.pop("image_size", None)
    for inner in written.values():
        if isinstance(inner, dict):
            _forget(inner)


def _processor(config: Any) -> dict[str, Any]:
    """Of pictures of the size that the model has positions for, else of SIDE."""
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or SIDE
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    size = {"height": height, "width": width}
    return {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True, "size": size}
