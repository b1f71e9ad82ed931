"""Encrypted folders: what is written opens whole or not at all, and what is wrong is named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from mptrain.cli import main
from mptrain.core.errors import DataError, UserError
from mptrain.data.sealed import kept, vault, write
from mptrain.data.sealed.cipher import CIPHERS
from mptrain.data.sealed.keys import read_key
from mptrain.data.sealed.vault import Vault, shard_name
from mptrain.recipe.data import Key

pytest.importorskip("cryptography")

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture
def small(monkeypatch):
    """Several pieces to a file and several shards, of a few bytes."""
    monkeypatch.setattr(vault, "PIECE", 100)
    monkeypatch.setattr(write, "PIECE", 100)
    monkeypatch.setattr(write, "SHARD", 400)


@pytest.fixture
def folder(tmp_path, small):
    source = tmp_path / "plain"
    (source / "below").mkdir(parents=True)
    (source / "a.csv").write_bytes(bytes(i % 251 for i in range(1234)))
    (source / "below" / "b.bin").write_bytes(b"b" * 300)
    (source / "empty").write_bytes(b"")
    return source


@pytest.fixture
def sealed(folder, tmp_path):
    write.encrypt(folder, tmp_path / "sealed", KEY, "aes-256-gcm")
    return tmp_path / "sealed"


def everything(root: Path) -> dict[str, bytes]:
    found = Vault(root, KEY)
    return {path: b"".join(found.pieces(path)) for path in found.files}


def contents(source: Path) -> dict[str, bytes]:
    return {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}


@pytest.mark.parametrize("cipher", CIPHERS)
def test_what_is_read_is_what_was_written(folder, tmp_path, cipher):
    facts = write.encrypt(folder, tmp_path / "sealed", KEY, cipher)
    assert everything(tmp_path / "sealed") == contents(folder)
    assert facts["files"] == 3 and facts["bytes"] == 1534 and facts["shards"] > 2
    write.decrypt(Vault(tmp_path / "sealed", KEY), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert not stat.S_IMODE((tmp_path / "again" / "a.csv").stat().st_mode) & 0o077


def test_a_stream_reads_and_seeks_like_a_file(sealed, folder):
    content = (folder / "a.csv").read_bytes()
    with Vault(sealed, KEY).open("a.csv") as stream:
        assert stream.read(150) == content[:150]
        assert stream.seek(-30, os.SEEK_END) == 1204 and stream.read() == content[-30:]
        stream.seek(99)
        assert stream.read(2) == content[99:101] and stream.seek(5000) == 5000 and stream.read() == b""


def test_nothing_of_content_or_names_is_in_clear(tmp_path):
    (tmp_path / "secretname.txt").write_text("CANARY sentence " * 50)
    write.encrypt(tmp_path / "secretname.txt", tmp_path / "sealed", KEY, "aes-256-gcm")
    for file in (tmp_path / "sealed").iterdir():
        assert b"CANARY" not in file.read_bytes() and b"secretname" not in file.read_bytes()
        assert KEY not in file.read_bytes() and KEY.hex().encode() not in file.read_bytes()


def test_the_same_data_is_never_written_alike(folder, tmp_path):
    for name in "ab":
        write.encrypt(folder, tmp_path / name, KEY, "aes-256-gcm")
    one, other = ((tmp_path / name / shard_name(0)).read_bytes() for name in "ab")
    assert one[16:] != other[16:]


def test_rotation_changes_the_key_and_nothing_else(sealed, folder, tmp_path):
    before = Vault(sealed, KEY)
    write.rotate(before, tmp_path / "rotated", OTHER, "chacha20-poly1305")
    after = Vault(tmp_path / "rotated", OTHER)
    assert {p: b"".join(after.pieces(p)) for p in after.files} == contents(folder)
    assert after.secret == before.secret and after.salt != before.salt
    with pytest.raises(DataError, match="not the key that"):
        Vault(tmp_path / "rotated", KEY)


def change(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def swap(root: Path) -> None:
    one, other, third = root / shard_name(0), root / shard_name(1), root / "third"
    one.rename(third)
    other.rename(one)
    third.rename(other)


def swap_and_rename(root: Path) -> None:
    """In another order, with the numbers in the shards made to fit."""
    swap(root)
    for number in (0, 1):
        content = bytearray((root / shard_name(number)).read_bytes())
        content[8:16] = number.to_bytes(8, "big")
        (root / shard_name(number)).write_bytes(content)


DAMAGES = {
    "missing": (lambda root: (root / shard_name(1)).unlink(), "shard-00001.sealed is missing"),
    "cut": (lambda root: os.truncate(root / shard_name(1), 200), "shard-00001.sealed is cut off: 200 bytes of"),
    "longer": (lambda root: lengthen(root / shard_name(1)), "shard-00001.sealed is too long"),
    "changed": (lambda root: change(root / shard_name(1), 60), "shard-00001.sealed was changed"),
    "changed tag": (lambda root: change(root / shard_name(2), -1), "shard-00002.sealed was changed"),
    "changed mark": (lambda root: change(root / shard_name(0), 3), "shard-00000.sealed was changed"),
    "another order": (swap, "shard-00000.sealed is shard 1 in the place of shard 0"),
    "hidden order": (swap_and_rename, "shard-00000.sealed was changed"),
    "index": (lambda root: change(root / vault.INDEX, 40), "index.sealed: not as it was written"),
    "no index": (lambda root: (root / vault.INDEX).unlink(), "index.sealed: cannot be read"),
    "header": (lambda root: change(root / vault.HEADER, 2), "sealed.json: its schema is|sealed.json: cannot be read"),
    "header text": (lambda root: (root / vault.HEADER).write_text("{"), "sealed.json: cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_named_and_nothing_is_read(sealed, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(sealed)
    with pytest.raises(DataError, match=message):
        everything(sealed)
    with pytest.raises(DataError, match=message):
        write.decrypt(Vault(sealed, KEY), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_shards_of_another_writing_of_the_same_data_do_not_open(folder, sealed, tmp_path):
    write.encrypt(folder, tmp_path / "other", KEY, "aes-256-gcm")
    shutil.copy(tmp_path / "other" / shard_name(1), sealed / shard_name(1))
    with pytest.raises(DataError, match=r"shard-00001\.sealed was changed"):
        everything(sealed)


def test_a_wrong_key_is_told_from_a_damage(sealed):
    with pytest.raises(DataError, match="not the key that"):
        Vault(sealed, OTHER)


@pytest.mark.parametrize("text", [KEY, KEY.hex().encode() + b"\n", base64.b64encode(KEY), KEY.hex().upper().encode()])
def test_the_forms_of_a_key(tmp_path, text, monkeypatch):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "k").write_bytes(text)
    data = tmp_path / "elsewhere" / "data"
    assert read_key(Key(file=str(tmp_path / "keys" / "k")), "data.key", [data]) == KEY
    if text.isascii() and b"\0" not in text:
        monkeypatch.setenv("MY_KEY", text.decode())
        assert read_key(Key(env="MY_KEY"), "data.key", []) == KEY
        printing = [sys.executable, "-c", f"print({text.decode()!r})"]
        assert read_key(Key(command=printing), "data.key", [], allow_code=True) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 31, b"x" * 32, b"0" * 63, b"g" * 64, b"0" * 65, bytes(33), b"=" * 44, b"A" * 44]
)
def test_a_key_of_another_length_or_form_is_refused_and_not_shown(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(DataError, match="holds no key") as caught:
        read_key(Key(file=str(tmp_path / "key")), "data.key", [])
    assert not content or content.decode("latin1") not in str(caught.value)


def test_a_key_beside_the_data_is_refused(tmp_path):
    data = tmp_path / "data" / "sealed"
    data.mkdir(parents=True)
    for place in (data / "key", data.parent / "key", data / "below" / "key"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(KEY)
        with pytest.raises(DataError, match="beside the data"):
            read_key(Key(file=str(place)), "data.key", [data])


@pytest.mark.parametrize(
    ("key", "allow", "message"),
    [
        ({"file": "/nowhere/key"}, False, "cannot be read"),
        ({"env": "NOT_SET_AT_ALL"}, False, "NOT_SET_AT_ALL is not set"),
        ({"command": ["true"]}, False, "--allow-code"),
        ({"command": ["/nowhere/program"]}, True, "cannot be run"),
        ({"command": ["false"]}, True, "exit status 1"),
        ({"command": ["true"]}, True, "holds no key"),
        ({"command": ["echo", "$HOME"]}, True, "holds no key"),  # no shell
    ],
)
def test_a_key_that_is_not_there(key, allow, message):
    with pytest.raises(DataError, match=message):
        read_key(Key(**key), "data.key", [], allow_code=allow)


def test_a_key_is_in_one_place():
    for given in ({}, {"env": "A", "file": "b"}, {"command": []}):
        with pytest.raises(ValueError):
            Key(**given)


def test_what_a_run_keeps_opens_with_the_secret_of_its_data_alone():
    sealed = kept.seal(KEY, b"content", "kept examples")
    assert b"content" not in sealed and kept.unseal(KEY, sealed, "kept examples") == b"content"
    assert kept.seal(KEY, b"content", "kept examples") != sealed
    with pytest.raises(Exception, match="damaged, or were written with other data"):
        kept.unseal(OTHER, sealed, "kept examples")


def test_the_commands(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.setenv("OLD", KEY.hex())
    monkeypatch.setenv("NEW", OTHER.hex())
    monkeypatch.chdir(tmp_path)
    assert main(["data", "encrypt", "plain", "sealed", "--key-env", "OLD"]) == 0
    assert "sealed: 3 files, 1,534 bytes" in capsys.readouterr().out
    assert main(["data", "rotate", "sealed", "rotated", "--key-env", "OLD", "--new-key-env", "NEW"]) == 0
    assert main(["data", "decrypt", "rotated", "again", "--key-env", "NEW"]) == 0
    assert contents(tmp_path / "again") == contents(folder)
    assert (
        main(["data", "encrypt", "plain/a.csv", "one.sealed", "--key-env", "OLD", "--cipher", "chacha20-poly1305"]) == 0
    )
    assert main(["data", "decrypt", "one.sealed", "a.csv", "--key-env", "OLD"]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (folder / "a.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("encrypt nothing to --key-env OLD", "no such file or folder"),
        ("encrypt hollow to --key-env OLD", "there is no file in it"),
        ("encrypt plain there --key-env OLD", "exists already"),
        ("encrypt plain plain/to --key-env OLD", "lies in plain"),
        ("encrypt plain to --key-env NOT_SET", "NOT_SET is not set"),
        ("encrypt plain to --key-file key", "beside the data"),
        ("encrypt sealed to --key-env OLD", "encrypted already"),
        ("decrypt plain to --key-env OLD", "no folder that"),
        ("decrypt sealed to --key-env NEW", "not the key that"),
        ("rotate sealed to --key-env OLD --new-key-env NOT_SET", "NOT_SET is not set"),
        ("encrypt plain to --key-command 'print me'", "--allow-code"),
        ("encrypt packaged:nothing to --key-env OLD", "packaged"),
    ],
)
def test_bad_input_is_one_paragraph_and_nothing_is_written(tmp_path, monkeypatch, capsys, sealed, words, message):
    import shlex

    monkeypatch.setenv("OLD", KEY.hex())
    monkeypatch.setenv("NEW", OTHER.hex())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "key").write_bytes(KEY)
    assert main(["data", *shlex.split(words)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 2
    assert not (tmp_path / "to").exists() and not (tmp_path / "plain" / "to").exists()
    assert json.loads((sealed / vault.HEADER).read_text())["schema"] == vault.SCHEMA


def test_a_target_that_is_there_is_never_overwritten(sealed, folder):
    with pytest.raises(UserError, match="exists already"):
        write.encrypt(folder, sealed, KEY, "aes-256-gcm")
