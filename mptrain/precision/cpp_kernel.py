"""The compiled kernel: kernel.cpp and kernel/*.h behind a C ABI, built at first use and cached (mptrain.core.native).

The library is built for the vector width of this CPU: AVX-512, AVX2 or what the architecture always has.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from array import array
from itertools import chain
from pathlib import Path

import torch

from mptrain.core import native
from mptrain.core.native import BuildError
from mptrain.precision import moments8
from mptrain.precision.flat import Flat
from mptrain.precision.step import AdamRule, Rule, Run

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-std=gnu++17", "-O2", "-pthread", "-fno-math-errno", "-fno-trapping-math")
VECTOR_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ELEMENTS_PER_THREAD = 1 << 18  # starting a thread costs about as much as updating this many parameters


class _Buffers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("master", "half", "low", "first", "second")]


class _Codes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in moments8.BUFFERS]


class NativeKernel:
    """`mptrain.precision.step.Kernel` for the CPU. Results do not depend on the number of threads."""

    def __init__(self, library: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"{library} could not be loaded: {error}") from error
        if not self.library.mptrain_runs_here():
            raise BuildError(f"{library} was built for another CPU")
        self.library.mptrain_norm.restype = ctypes.c_double

    def sync(self, flat: Flat) -> None:
        if flat.master is None or flat.half is None:
            return
        master, half = ctypes.c_void_p(flat.master.data_ptr()), ctypes.c_void_p(flat.half.data_ptr())
        self.library.mptrain_narrow(master, half, ctypes.c_int64(flat.numel), TYPES[flat.dtype], _threads(flat.numel))

    def norm(self, run: Run) -> float:
        segments, kind, threads = self._segments(run)
        return self.library.mptrain_norm(_pointer(segments), _length(segments), kind, threads)

    def update(self, run: Run, rule: Rule, factor: float) -> None:
        flat = run.flat
        buffers = _Buffers(*(None if t is None else t.data_ptr() for t in (flat.master, flat.half, flat.low)))
        constants = array("d", (-factor if rule.maximize else factor, *rule.constants))
        segments, kind, threads = self._segments(run)
        given = _pointer(segments), _length(segments), kind, ctypes.byref(buffers)
        if flat.coded:
            codes = _Codes(*(flat.state(name).data_ptr() for name in moments8.BUFFERS))
            turns = (ctypes.c_uint32(moments8.turn(name, rule.step)) for name in (moments8.FIRST, moments8.SECOND))
            self.library.mptrain_adam8(*given, ctypes.byref(codes), _pointer(constants), *turns, threads)
            return
        for field, name in zip(("first", "second"), rule.states):
            setattr(buffers, field, flat.state(name).data_ptr())
        if isinstance(rule, AdamRule):
            step = self.library.mptrain_adam
        else:
            step = self.library.mptrain_momentum if rule.momentum else self.library.mptrain_sgd
        step(*given, TYPES[flat.dtype], _pointer(constants), threads)

    @staticmethod
    def _segments(run: Run) -> tuple[array, int, int]:
        """The C array of (address, offset, length), the gradients' type, and how many threads the work is worth."""
        numels = [g.numel() for g in run.gradients]
        addresses = [g.data_ptr() for g in run.gradients]
        segments = array("q", chain.from_iterable(zip(addresses, run.offsets, numels, strict=True)))
        return segments, TYPES[run.gradients[0].dtype], _threads(sum(numels))


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD))


def _pointer(values: array) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.buffer_info()[0])


def _length(segments: array) -> ctypes.c_int64:
    return ctypes.c_int64(len(segments) // 3)


@functools.cache
def native_kernel() -> NativeKernel | None:
    """The kernel for this CPU, built if need be; None, with one line in the log, where that fails."""
    try:
        return NativeKernel(build(vector_width()))
    except BuildError as error:
        log.warning("optimizer steps run in torch instead of the compiled kernel: %s", error)
        return None


def vector_width() -> str:
    """A key of VECTOR_FLAGS."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def build(width: str, folder: Path | None = None) -> Path:
    """The shared library for a vector width, compiled unless it is cached. Raises BuildError."""
    return native.build(SOURCE, (*FLAGS, *VECTOR_FLAGS[width]), link=("-pthread",), folder=folder)
