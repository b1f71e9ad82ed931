"""The command line. Parses and calls; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from importlib import import_module

from mptrain.core.errors import MptrainError, out_of_memory

EXIT = (
    """exit status: 0 done, 1 the run failed, 2 wrong input, 3 a gate of the recipe was missed, 130 stopped by Ctrl-C"""
)

COMMANDS = {
    "recipe": "recipe",
    "list": "list",
    "show": "show",
    "copy": "copy",
    "validate": "validate",
    "schema": "schema",
    "inspect": "run_inspect",
    "verify": "run_verify",
    "export": "run_export",
    "data": "data",
    "report": "report",
    "compare": "compare",
    "doctor": "doctor",
    "convert-config": "convert_config",
}
"""to each its module of mptrain.commands: HELP, add(parser), run(options) -> exit status. All are imported: light"""

MAIN_SPEAKS_FIRST = 10.0
"""seconds that an error of another process than the main one waits before it is said"""

# Libraries in other languages raise their own errors, so the text decides: full disk, quota, ulimit.
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
OUT_OF_MEMORY = (
    "out of memory. In training lower train.batch_size (and raise accumulation) or data.max_length; `mptrain inspect`"
    " and --dry-run say what a model needs."
)
EXTRAS = {
    "openvino_telemetry": "openvino",
    "matplotlib": "plots",
    "gguf": "gguf",
    "cryptography": "encryption",
    "peft": "adapters",
}
"""of mptrain, by the package that is missing; those of the export formats are in their specs"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.call(options)
    except MptrainError as error:
        return _fail(str(error), error.exit_code, _kind(error))
    except KeyboardInterrupt:
        return _fail("stopped. The same command continues the run.", 130, "")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = _extra((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed. Install it with: pip install 'mptrain[{extra}]'", 1)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"{str(error.filename)[:60]}… is longer than a path can be; give the right one.", 2)
        if isinstance(error, OSError) and error.errno in FORBIDDEN and error.filename:
            return _fail(f"{error.filename}: {error.strerror}. Choose another place, or change its rights.", 2)
        if any(reason in str(error) for reason in NO_SPACE):
            return _fail(f"the disk is full ({error}). Free some space; the same command continues the run.", 1)
        if out_of_memory(error):
            return _fail(OUT_OF_MEMORY, 1)
        raise


def _extra(module: str) -> str | None:
    """The extra of mptrain that brings a package."""
    from mptrain.recipe import EXPORTS

    found = {p.module.split(".")[0]: spec.extra for spec in EXPORTS.values() for p in spec.packages}
    return (EXTRAS | found).get(module)


def _kind(error: MptrainError) -> str:
    """The kind that a class of a user's own is of."""
    return next(c.__name__.lower() for c in type(error).__mro__ if c.__module__ == MptrainError.__module__)


def _fail(message: str, code: int, section: str = "what-is-not-an-error-of-ours") -> int:
    """section: of docs/troubleshooting.md, that says more about errors of this kind."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if not section:
            return code
        # What ails one process mostly ails all, and a launcher ends the others as soon as one has: the main one is
        # given the time to say it, and what ails this one alone is said too.
        time.sleep(MAIN_SPEAKS_FIRST)
    print(f"mptrain: {'error: ' if section else ''}{'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr)
    if section:
        print(f"mptrain: see docs/troubleshooting.md#{section}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    found = argparse.ArgumentParser(
        prog="mptrain", description="Make trained networks small and fast while training them.", epilog=EXIT
    )
    commands = found.add_subparsers(required=True, metavar="COMMAND")

    for name, file in COMMANDS.items():
        module = import_module(f"mptrain.commands.{file}")
        command = commands.add_parser(name, help=module.HELP)
        module.add(command)
        command.set_defaults(call=module.run)

    found.add_argument("--version", action="version", version=_version())
    return found


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mptrain {version('mptrain')}"
    except PackageNotFoundError:
        return "mptrain (not installed)"


if __name__ == "__main__":
    sys.exit(main())
