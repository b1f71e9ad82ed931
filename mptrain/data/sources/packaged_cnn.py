"""packaged:cnn: small convolutional networks as code (cnn.py), and how the packaged shapes are given to them.

What a user has who wrote a network in plain torch: a file whose functions build it (`module: cnn.py:resnet`), with
random weights. Beside it lies a preprocessor_config.json for pictures of 24 x 24 pixels.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import ViTImageProcessorPil

from mptrain.data.sources import cnn
from mptrain.data.sources.packaged_shapes import SIDE

VERSION = 2
SOURCE = None


def make(source: Path | None, folder: Path) -> None:
    """Write code and processor to `folder`."""
    half = [0.5] * 3
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half).save_pretrained(folder)
    shutil.copy(Path(cnn.__file__), folder / "cnn.py")
