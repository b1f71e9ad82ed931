"""A folder that `datasets` saved with save_to_disk, from any place: the library itself only reads the disk.

    dataset_dict.json {splits}, then a folder to each; or one folder: state.json {_data_files}, dataset_info.json, and
    Arrow tables in the stream format

The tables are in memory, and nothing is cached on disk: no transformation of `datasets` that does is used on them.
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

from mptrain.data.sources.places import Place


def load_dataset_folder(place: Place) -> dict[str, Any]:
    """Dataset by split, "train" where there are none. Raises OSError, ValueError and KeyError for other folders."""
    try:
        splits = json.loads(place.read("dataset_dict.json"))["splits"]
    except FileNotFoundError:
        return {"train": _dataset(place, "")}
    return {split: _dataset(place, split) for split in splits}


def _dataset(place: Place, folder: str) -> Any:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo
    from datasets.table import InMemoryTable

    state, info = (json.loads(place.read(posixpath.join(folder, f))) for f in ("state.json", "dataset_info.json"))
    tables = []
    for file in state["_data_files"]:
        with place.open(posixpath.join(folder, file["filename"])) as stream:
            tables.append(pa.ipc.open_stream(stream).read_all())
    return Dataset(InMemoryTable(pa.concat_tables(tables)), info=DatasetInfo.from_dict(info))
