"""Shared by all tests: one thread, no network, no hub, no deadlines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from mptrain.data.sources import quoting

hypothesis.settings.register_profile("mptrain", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("mptrain")


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # before the fixtures of the next module, which come before this one


@pytest.fixture(autouse=True)
def _cells_are_quoted(monkeypatch):
    """As in a new process, which has read no encrypted data."""
    monkeypatch.setattr(quoting, "_hidden", False)
