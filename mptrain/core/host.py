"""The machine: CPU, its flags that matter, memory, threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Literal

import psutil

# What decides the speed of fp32, half and int8 arithmetic.
_FLAGS = {
    "x86": "sse4_1 sse4_2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx_vnni avx_vnni_int8"
    " avx512_bf16 avx512_fp16 avx_ne_convert amx_tile amx_int8 amx_bf16 amx_fp16",
    "arm": "neon asimd asimdhp asimddp i8mm bf16 sve sve2 svei8mm svebf16 sme sme2",
}

_FAST = {
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "svebf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""one of these, and the CPU computes in that type at a gain"""

_CPUINFO = Path("/proc/cpuinfo")  # of Linux

_MAC_FLAGS = {
    "hw.optional.arm.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}


def thread_count(threads: int | Literal["all"]) -> int:
    """Of an entry of evaluate.latency.threads."""
    return usable_cpus() if threads == "all" else threads


def usable_cpus() -> int:
    """CPUs this process may run on (fewer than the machine has, under taskset or a batch system)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host() -> dict[str, Any]:
    """Where the numbers were taken. `cpu_flags` lists only what this CPU has."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "cores": os.cpu_count() or 1,
        "cores_usable": usable_cpus(),
        "ram_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def fast(flags: list[str]) -> dict[str, bool]:
    """Whether a CPU of these flags has instructions for "int8" dot products, "bf16" and "fp16"."""
    return {kind: any(flag in flags for flag in needed) for kind, needed in _FAST.items()}


def adds_int8_in_16_bits() -> bool:
    """Whether this is an x86 CPU that sums two int8 products in 16 bits: it has neither VNNI nor AMX."""
    return platform.machine() in ("x86_64", "AMD64") and not fast(_cpu()[1])["int8"]


def _cpu() -> tuple[str, list[str]]:
    if platform.system() == "Darwin":
        names = ["machdep.cpu.brand_string", *_MAC_FLAGS]
        # Unknown names are an error of the exit status only; the known ones still print.
        shown = subprocess.run(["sysctl", *names], capture_output=True, text=True, check=False).stdout
        values = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line)
        model = values.get("machdep.cpu.brand_string", platform.processor())
        return model, [flag for name, flag in _MAC_FLAGS.items() if values.get(name) == "1"]
    try:
        return parse_cpuinfo(_CPUINFO.read_text(errors="replace"))
    except OSError:  # Windows, and sandboxes without /proc: no flags are known
        return platform.processor() or platform.machine(), []


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Model name and relevant flags from the text of Linux's /proc/cpuinfo (x86 or Arm)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = (fields.get("flags") or fields.get("features") or "").split()
    known = " ".join(_FLAGS.values()).split()
    model = fields.get("model name") or fields.get("hardware") or platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", model), [flag for flag in known if flag in flags]
