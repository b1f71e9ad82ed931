"""Kernels are compiled once, never mixed up, and a failure has a reason."""

import ctypes
import subprocess
import sys

import pytest

from mptrain.core.native import BuildError, build


@pytest.fixture
def source(tmp_path):
    def write(text, suffix=".c"):
        path = tmp_path / f"kernel{suffix}"
        path.write_text(text)
        return path

    return write


def answer(library):
    return ctypes.CDLL(str(library)).answer()


def test_a_kernel_is_compiled_once(source, tmp_path):
    path = source("int answer(void) { return 42; }")
    first = build(path, ("-O2",), folder=tmp_path)
    made = first.stat().st_mtime_ns
    assert answer(first) == 42
    assert build(path, ("-O2",), folder=tmp_path) == first and first.stat().st_mtime_ns == made


@pytest.mark.parametrize("suffix", [".c", ".cpp"])
def test_changed_source_and_changed_flags_are_other_libraries(source, tmp_path, suffix):
    text = 'extern "C" int answer() { return N; }' if suffix == ".cpp" else "int answer(void) { return N; }"
    libraries = [build(source(text, suffix), (f"-DN={n}",), folder=tmp_path) for n in (1, 2)]
    libraries.append(build(source(text.replace("N;", "N + 10;"), suffix), ("-DN=1",), folder=tmp_path))
    assert [answer(library) for library in libraries] == [1, 2, 11]


def test_a_changed_header_makes_another_library(source, tmp_path):
    path, header = source('#include "kernel/n.h"\nint answer(void) { return N; }'), tmp_path / "kernel" / "n.h"
    header.parent.mkdir()
    libraries = []
    for n in (1, 2):
        header.write_text(f"#define N {n}\n")
        libraries.append(build(path, (), folder=tmp_path))
    assert [answer(library) for library in libraries] == [1, 2]


def test_without_a_compiler_the_message_says_so(source, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BuildError, match=r"no C compiler was found .*set CC"):
        build(source("int x;"), (), folder=tmp_path)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found .*set CXX"):
        build(source("int x;", ".cpp"), (), folder=tmp_path)


def test_an_error_in_the_source_is_the_reason_given(source, tmp_path):
    with pytest.raises(BuildError, match=r"failed: .*expected"):
        build(source("int x"), (), folder=tmp_path)
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_a_compiler_that_fails_is_the_reason_given(source, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match="false"):
        build(source("int x;"), (), folder=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_build_error(source, tmp_path):
    (tmp_path / "kernels").write_text("a file, not a folder")
    with pytest.raises(BuildError):
        build(source("int x;"), (), folder=tmp_path)


def test_processes_that_build_at_once_get_one_whole_library(source, tmp_path):
    path = source("int answer(void) { return 7; }")
    script = (
        "import sys, ctypes; from pathlib import Path; from mptrain.core.native import build;"
        "path = build(Path(sys.argv[1]), ('-O3',), folder=Path(sys.argv[2]));"
        "assert ctypes.CDLL(str(path)).answer() == 7; print(path)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {job.communicate(timeout=300)[0].strip() for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0] and len(paths) == 1
    assert sorted(p.suffix for p in (tmp_path / "kernels").iterdir()) == [".lock", ".so"]
