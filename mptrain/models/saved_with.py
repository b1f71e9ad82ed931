"""A folder that does not fit the model may have been saved with a transformers that names its layers otherwise, as 5.24
does ViT's, DeiT's and Swin's of 5.5: then the error says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers

from mptrain.core.errors import ModelError


@contextmanager
def said(config: Mapping[str, Any]) -> Iterator[None]:
    """A ModelError from within names the version of config.json, where another is installed, and the way back."""
    try:
        yield
    except ModelError as error:
        version = str(config.get("transformers_version"))
        if version == transformers.__version__ or not re.fullmatch(r"\d+(\.\w+)+", version):
            raise
        raise ModelError(
            f"{error}. It was saved with transformers {version}, whose layers may have other names than those of"
            f" {transformers.__version__}, which is installed: pip install 'transformers=={version}'"
        ) from None
