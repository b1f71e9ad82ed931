"""NNCF and OpenVINO talk: log lines, progress bars, and reports of usage to a server. Not inside ours."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from mptrain.core.patch import replaced


def import_unreported(package: str) -> None:
    """Import a package whose import alone would report its use to a server (OpenVINO)."""
    with _environment("CI", "true"):  # the documented way to decline
        import_module(package)


@contextmanager
def silenced() -> Iterator[None]:
    """Runs the body without their output and without network; everything global is as before afterwards.

    Errors still raise, and NNCF's log lines of level ERROR still show. Not for use in several threads at once.
    """
    with _environment("CI", "true"):  # the documented way to decline reports; read when the sender is made
        import openvino_telemetry
        from nncf.common.logging import nncf_logger, track_progress
        from rich.console import Console

    bar = track_progress.track.__init__

    def no_bar(self: Any, *args: Any, **options: Any) -> None:
        bar(self, *args, **(options | {"disable": True, "console": Console(quiet=True)}))  # rich 13.7 ends even these

    def nothing(*_: Any, **__: Any) -> None:
        return None

    sender = openvino_telemetry.Telemetry
    level = nncf_logger.level
    with (
        _environment("CI", "true"),
        replaced(track_progress.track, __init__=no_bar),
        replaced(sender, start_session=nothing, send_event=nothing, end_session=nothing),
        warnings.catch_warnings(),
    ):
        nncf_logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            nncf_logger.setLevel(level)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    saved = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if saved is None:
            del os.environ[name]
        else:
            os.environ[name] = saved
