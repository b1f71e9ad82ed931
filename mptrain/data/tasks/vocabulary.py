"""How much of a text its tokenizer knows.

A tokenizer that was saved under the wrong class, for another language or without its spaces still gives ids: most
of them that of "unknown". Everything then runs, and the scores are those of a model that cannot read. The share of
such tokens is a fact of the report, above 1% a warning, above `data.max_unknown` an error.

A vocabulary without an unknown token leaves out what it does not have: there the share is that of the characters,
other than spaces, that no token covers, in the first texts of the split. A tokenizer that is not fast does not say
which characters its tokens cover: its unknown tokens are counted, and the pieces are not named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import shown
from mptrain.data.tasks.base import Task

log = logging.getLogger(__name__)

WARNED = 0.01
_LOOKED_AT = 64
_CHARACTERS = 20_000


def note_unknown(task: Task, split: str, encoding: Any, texts: Sequence[str]) -> None:
    """Keep the share in task.facts["unknown_tokens"][split] and judge it. texts: those that were encoded, or some.

    Raises DataError above `data.max_unknown`.
    """
    tokenizer = task.processor
    found, missed = _looked_at(tokenizer, texts)
    share = missed if tokenizer.unk_token_id is None else unknown_share(encoding, tokenizer)
    task.facts.setdefault("unknown_tokens", {})[split] = share
    if share <= WARNED:
        return
    what = "characters" if tokenizer.unk_token_id is None else "tokens"
    examples = f" (such as {', '.join(map(shown, found))})" if found else ""
    said = f"{100 * share:.1f}% of the {what} of {split} are unknown to the tokenizer{examples}"
    if share > task.spec.max_unknown:
        raise DataError(
            f"data.max_unknown: {said}, more than {100 * task.spec.max_unknown:g}%. The model cannot read what its"
            " tokenizer does not know: check that the folder has the model's own tokenizer, of the right class and"
            f" language. Raise data.max_unknown to at least {share:.2f} if this is meant."
        )
    log.warning("data: %s. Check that the model's folder has its own tokenizer.", said)


def unknown_share(encoding: Any, tokenizer: Any) -> float:
    """Of the tokens of an encoding, without those that the tokenizer adds around a text."""
    unknown = tokenizer.unk_token_id
    added = [number for number in tokenizer.all_special_ids if number != unknown]
    count = total = 0
    for ids, around in _tokens(encoding, added):
        total += int((~around).sum())
        count += int((ids[~around] == unknown).sum())
    return count / total if total else 0.0


def _tokens(encoding: Any, added: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, whether each was added) of each text."""
    if encoding.encodings is not None:
        for one in encoding.encodings:
            yield np.asarray(one.ids), np.asarray(one.special_tokens_mask) != 0
        return
    rows = encoding["input_ids"]
    for row in rows if rows and isinstance(rows[0], list) else [rows]:
        ids = np.asarray(row)
        yield ids, np.isin(ids, added)


def _looked_at(tokenizer: Any, texts: Sequence[str]) -> tuple[list[str], float]:
    """Up to three unknown pieces of the first texts, and the share of their characters that no token covers."""
    found: dict[str, None] = {}
    if not tokenizer.is_fast:
        return [], 0.0
    missed = total = 0
    for text in texts[:_LOOKED_AT]:
        text = text[:_CHARACTERS]
        one = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        covered = np.array([character.isspace() for character in text], dtype=bool)
        total += int((~covered).sum())
        for token, (start, end) in zip(one["input_ids"], one["offset_mapping"]):
            covered[start:end] = True
            if token == tokenizer.unk_token_id and len(found) < 3:
                found.setdefault(text[start:end])
        missed += int((~covered).sum())
        if tokenizer.unk_token_id is None and len(found) < 3:
            found |= dict.fromkeys(text[i] for i in np.flatnonzero(~covered)[: 3 - len(found)])
    return list(found), missed / total if total else 0.0
