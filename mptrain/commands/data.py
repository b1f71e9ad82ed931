"""`mptrain data`: encrypt data files and folders, decrypt them, give them another key."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.core.errors import DataError, UserError

if TYPE_CHECKING:
    from mptrain.recipe.data import Key

HELP = "encrypt, decrypt or re-encrypt training data"

_CIPHERS = ("aes-256-gcm", "chacha20-poly1305")


def add(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(required=True, metavar="STEP", dest="step")
    sources = {
        "encrypt": "a data file, a folder with everything below it, or packaged:film-reviews",
        "decrypt": "an encrypted folder",
        "rotate": "an encrypted folder",
    }
    for name, source in sources.items():
        step = steps.add_parser(name, help=_STEPS[name], description=f"{_STEPS[name].capitalize()}.")
        step.add_argument("source", metavar="SOURCE", help=source)
        step.add_argument("target", metavar="DEST", help="what is written; it must not exist")
        _add_key(step, "key", "the key")
        if name == "rotate":
            _add_key(step, "new-key", "the new key")
        if name != "decrypt":
            step.add_argument("--cipher", choices=_CIPHERS, default=_CIPHERS[0], help=f"default: {_CIPHERS[0]}")
        step.add_argument("--allow-code", action="store_true", help="run the command that prints a key")


_STEPS = {
    "encrypt": "write an encrypted copy of data",
    "decrypt": "write the data of an encrypted folder as it was",
    "rotate": "write an encrypted folder again, under another key",
}


def _add_key(step: argparse.ArgumentParser, name: str, what: str) -> None:
    places = step.add_mutually_exclusive_group(required=True)
    places.add_argument(f"--{name}-file", metavar="FILE", help=f"the file with {what}, not beside the data")
    places.add_argument(f"--{name}-env", metavar="NAME", help=f"the environment variable that holds {what}")
    places.add_argument(
        f"--{name}-command", metavar="COMMAND", help=f"a command that prints {what}, run without a shell"
    )


def run(options: argparse.Namespace) -> int:
    from mptrain.data.sealed import write
    from mptrain.data.sealed.vault import Vault, root_of

    source, target = Path(options.source).expanduser(), Path(options.target).expanduser()
    write.check_new(target, source)
    key = _read(options, "key", source, target)
    if options.step == "encrypt":
        if options.source.startswith("packaged:"):
            facts = write.write([_packaged(options.source)], "file", target, key, options.cipher)
        else:
            facts = write.encrypt(source, target, key, options.cipher)
    else:
        if root_of(source) != source:
            raise DataError(f"{source}: it is no folder that `mptrain data encrypt` wrote.")
        vault = Vault(source, key, "--key")
        if options.step == "decrypt":
            facts = write.decrypt(vault, target)
        else:
            facts = write.rotate(vault, target, _read(options, "new_key", source, target), options.cipher)
    many = "s" * (facts["files"] != 1), "s" * (facts["shards"] != 1)
    print(f"{target}: {facts['files']} file{many[0]}, {facts['bytes']:,} bytes, {facts['shards']} shard{many[1]}")
    return 0


def _read(options: argparse.Namespace, name: str, source: Path, target: Path) -> bytes:
    from mptrain.data.sealed.keys import read_key
    from mptrain.recipe.data import Key

    given: dict[str, Any] = {place: getattr(options, f"{name}_{place}") for place in ("file", "env", "command")}
    option = f"--{name.replace('_', '-')}"
    if given["command"] is not None:
        try:
            given["command"] = shlex.split(given["command"])
        except ValueError as error:
            raise UserError(f"{option}-command: {error}; quote its arguments as a shell wants it.") from None
        if not given["command"]:
            raise UserError(f"{option}-command: it is empty.")
    key: Key = Key(**given)
    beside = [target, *([source] if source.is_dir() else [])]
    return read_key(key, option, beside, allow_code=options.allow_code)


def _packaged(reference: str) -> tuple[str, Iterator[bytes]]:
    """A packaged data set as recipes read it: one jsonl file."""
    from mptrain.data.sealed.write import pieces_of_bytes
    from mptrain.data.sources.read import read_source
    from mptrain.recipe import Data

    table = read_source(Data(source=reference), []).tables["train"]
    rows = zip(*table.columns.values())
    lines = (json.dumps(dict(zip(table.columns, row)), ensure_ascii=False) + "\n" for row in rows)
    return f"{reference.partition(':')[2]}.jsonl", pieces_of_bytes(line.encode() for line in lines)
