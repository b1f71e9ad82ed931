"""C kernels that sit beside their Python module, compiled at first use where there is a compiler.

A kernel file is plain C behind a C ABI: it compiles in a fraction of a second, without
Python or torch headers. The library is kept in the user's cache under a hash of its source,
the flags and the processor, so a cache shared between machines is safe. OpenMP's functions
are left to be found in the process: there they come from torch, whose thread pool and
thread count the kernel then shares (a second pool would fight it for the cores).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mptrain.inputs.packaged import cache_folder

log = logging.getLogger(__name__)

# No contraction to fma: a kernel then gives the bits of the same operations in torch.
_FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_THREADING = ("-fopenmp", "-fopenmp-simd")  # tried in this order; the second has no threads


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled kernels of a .c file, or None where they cannot be built; the reason is logged once."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.info("no C compiler found (CC or cc): %s runs on torch operations, slower", source.stem)
        return None
    failure = ""
    for threading in _THREADING:
        try:
            return ctypes.CDLL(str(_compiled(compiler, source, threading)))
        except subprocess.CalledProcessError as error:
            failure = error.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
    log.info("%s could not be compiled and runs on torch operations, slower: %s", source.stem, failure[-500:])
    return None


def _compiled(compiler: str, source: Path, threading: str) -> Path:
    flags = (*_FLAGS, threading)
    identity = "\0".join((compiler, *flags, platform.platform(), _processor(), source.read_text(encoding="utf-8")))
    folder = cache_folder() / "kernels"
    library = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
            undefined = ("-Wl,-undefined,dynamic_lookup",) if platform.system() == "Darwin" else ()
            for command in (
                (compiler, *flags, "-c", str(source), "-o", str(compiled)),
                (compiler, "-shared", str(compiled), "-o", str(linked), *undefined),
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            os.replace(linked, library)
    return library


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
