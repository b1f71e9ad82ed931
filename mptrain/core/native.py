"""C and C++ kernels that sit beside their Python module, compiled at first use where there is a compiler.

A kernel file has a plain C ABI: it compiles in a second or two, without Python or torch
headers. Headers of ours are in a folder with its name: kernel/*.h beside kernel.cpp. The
library is kept in the user's cache under a hash of source, headers, flags, compiler and
processor, so that machines which share a cache, or a changed source, never load a wrong one.
It is compiled under a temporary name and moved: of processes that build at once, one does and
the others wait for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mptrain.core.disk import cache_folder, held

log = logging.getLogger(__name__)

COMPILERS = {".c": ("C", "CC", ("cc", "gcc", "clang")), ".cpp": ("C++", "CXX", ("c++", "g++", "clang++"))}


# No contraction to fma: a kernel then gives the bits of the same operations in torch.
FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# OpenMP's functions are left to be found in the process: there they come from torch, whose pool and
# thread count the kernel then shares. The second choice has no threads.
THREADING = ("-fopenmp", "-fopenmp-simd")


class BuildError(Exception):
    """The kernel could not be compiled or loaded on this machine."""


@cache
def load(source: Path, what: str) -> ctypes.CDLL | None:
    """The kernels of a .c file with OpenMP, or None where they cannot be built.

    what: "fake quantization", which then runs on torch operations; the reason is logged once.
    """
    reason = ""
    for threading in THREADING:
        try:
            return ctypes.CDLL(str(build(source, (*FLAGS, threading))))
        except (BuildError, OSError) as error:
            reason = str(error)
    log.info("%s runs on torch operations, slower, instead of the compiled kernel: %s", what, reason)
    return None


def build(source: Path, flags: Sequence[str], *, link: Sequence[str] = (), folder: Path | None = None) -> Path:
    """The shared library of a .c or .cpp file, compiled unless it is cached.

    flags: of the compilation; link: of the linking, which are two steps so that a library a
    flag asks for (-fopenmp) can be left to be found in the process. folder: the cache,
    default ~/.cache/mptrain. Raises BuildError with the compiler's first error.
    """
    compiler = _compiler(source.suffix)
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        said = (shlex.join([*compiler, *flags, *link]), platform.platform(), _processor())
        key = hashlib.sha256(b"\0".join([_text(source), version, *(s.encode() for s in said)])).hexdigest()
        folder = (folder or cache_folder()) / "kernels"
        library = folder / f"{source.stem}-{key[:16]}.so"
        if library.is_file():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with held(library.with_suffix(".lock")):
            if not library.is_file():
                _compile(compiler, source, flags, link, library)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{shlex.join(compiler)} failed: {first}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    return library


def _text(source: Path) -> bytes:
    """With the headers that belong to it."""
    return b"".join(path.read_bytes() for path in [source, *sorted(source.with_suffix("").glob("*.h"))])


def _compile(compiler: list[str], source: Path, flags: Sequence[str], link: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
        undefined = ("-Wl,-undefined,dynamic_lookup",) if platform.system() == "Darwin" else ()
        for command in (
            [*compiler, *flags, "-fPIC", "-c", str(source), "-o", str(compiled)],
            [*compiler, "-shared", str(compiled), *link, *undefined, "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, check=True, timeout=300)
        os.replace(linked, library)


def compiler_name(suffix: str) -> str | None:
    """The command that compiles such files here, None where there is none."""
    try:
        return shlex.join(_compiler(suffix))
    except BuildError:
        return None


def _compiler(suffix: str) -> list[str]:
    language, variable, names = COMPILERS[suffix]
    chosen = shlex.split(os.environ.get(variable, ""))
    found = chosen or [path for name in names if (path := shutil.which(name))][:1]
    if not found:
        raise BuildError(f"no {language} compiler was found (install {names[1]} or {names[2]}, or set {variable})")
    return found


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
