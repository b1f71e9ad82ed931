"""One case: the command line, in this process, with what it says and how it ends."""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptrain.cli import main

SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """kind: "exit N", "traceback", "silent" (a failure without a word) or "timeout". at: where an error came from."""

    kind: str
    said: str = ""
    at: str = ""

    @property
    def bad(self) -> bool:
        return self.kind in ("traceback", "silent", "timeout")


class TooLong(BaseException):
    pass


@contextlib.contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(arguments: list[str]) -> Outcome:
    """What `mptrain ARGUMENTS` does."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
            code = main(arguments)
    except TooLong:
        return Outcome("timeout")
    except SystemExit as error:
        return Outcome(f"exit {error.code}", err.getvalue()[-300:])
    except BaseException as error:
        return failed(error)
    said = err.getvalue()
    if code and "error: " not in said:
        return Outcome("silent", said[-300:])
    return Outcome(f"exit {code}", said[-300:])


def failed(error: BaseException) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "mptrain/" in f.filename] or list(frames)
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return Outcome("traceback", f"{type(error).__name__}: {error}"[:300], at)
