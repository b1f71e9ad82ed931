"""sha256 of what a task was given, by which a run knows its data again: inputs, targets and splits, not paths.

Of encrypted data it is an HMAC with a key, so that it does not tell who has the data from who guesses it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mptrain.data.sources.splits import SPLITS
from mptrain.data.sources.tables import Table

GROUP, IDENTITY = "split.group", "identity"
"""columns beside the fields of a task: the value that may not cross splits, and what makes inputs the same"""


@dataclass(frozen=True)
class Content:
    """secret: of encrypted data. inputs: the fields that a model sees; the other columns are targets."""

    secret: bytes | None
    inputs: Sequence[str]

    def of_splits(self, classes: Any, tables: Mapping[str, Table]) -> str:
        digest = self._digest(json.dumps(classes).encode())
        for name in SPLITS:
            self._add(digest, name, tables[name])
        return digest.hexdigest()

    def with_more(self, known: str, name: str, table: Table) -> str:
        """Of what had the hash `known`, with further rows."""
        digest = self._digest(known.encode())
        self._add(digest, name, table)
        return digest.hexdigest()

    def of_rows(self, name: str, table: Table) -> str:
        digest = self._digest()
        self._add(digest, name, table)
        return digest.hexdigest()

    def of_examples(self, examples: Iterable[Mapping[str, Any]]) -> str:
        """Of what is read of a running text, whose windows depend on the tokenizer."""
        digest = self._digest()
        for example in examples:
            for name, value in sorted(example.items()):
                digest.update(f"{name}\0".encode() + np.asarray(value).tobytes())
        return digest.hexdigest()

    def _digest(self, begun: bytes = b"") -> Any:
        return hashlib.sha256(begun) if self.secret is None else hmac.new(self.secret, begun, "sha256")

    def _add(self, digest: Any, split: str, table: Table) -> None:
        targets = [table[column] for column in table.columns if column not in (*self.inputs, GROUP, IDENTITY)]
        for row in zip(table[IDENTITY], *targets):
            line = json.dumps([split, *row], ensure_ascii=False, sort_keys=True, default=str)
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
