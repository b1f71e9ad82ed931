"""What a run prints: our own log and progress, and only warnings of the libraries beneath."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any


def quiet_libraries() -> None:
    """Set up logging for the command line; the library itself never touches these."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    main_process = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("mptrain")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
    logger.propagate = False
    talkative = ("nncf", "optimum", "accelerate", "torch.distributed", "openvino", "torchao", "torch.utils._pytree")
    for name in (*talkative, "coremltools"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def show(renderable: Any) -> None:
    """Print what rich can draw: as wide as the terminal, 120 columns into a file."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)
