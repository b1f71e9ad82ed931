"""`mptrain doctor`: this machine, what is installed, what each extra would add, and what will be fast here."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

HELP = "this machine, installed and tested versions, and what is fast here"
SCHEMA = "mptrain.doctor/v1"
BASE = ("torch", "transformers", "accelerate", "datasets", "numpy")


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the machine, the packages and whether they were tested, and what will be fast here."
    parser.add_argument("--json", metavar="PATH", help="also write everything that was found as JSON")


def run(options: argparse.Namespace) -> int:
    from mptrain.commands.options import json_target

    target = json_target(options)
    found = facts()
    print("\n".join(lines(found)))
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, found)
        print(f"Written: {target}")
    return 0


def facts() -> dict[str, Any]:
    """As JSON values: {"schema", "host", "mptrain", "packages": [{"name", "version", "tested", "wanted"}], "extras":
    [{"name", "adds", "missing"}], "compiler", "gpus", "cache", "fast": {"int8", "bf16", "fp16"}}."""
    from mptrain.core.disk import cache_folder
    from mptrain.core.host import fast, host
    from mptrain.core.native import compiler_name

    machine = host()
    return {
        "schema": SCHEMA,
        "host": machine,
        "mptrain": _version("mptrain"),
        "packages": _packages(),
        "extras": _extras(),
        "compiler": compiler_name(".c"),
        "gpus": _gpus(),
        "cache": str(cache_folder()),
        "fast": fast(machine["cpu_flags"]),
    }


def _packages() -> list[dict[str, Any]]:
    """tested: whether the parts that are private to the package were tested in this version; None where we use none."""
    from mptrain.core.pins import PINS, is_tested
    from mptrain.recipe import EXPORTS

    of_formats = [package.name for spec in EXPORTS.values() for package in spec.packages if package.needed]
    found = []
    for name in dict.fromkeys([*BASE, *of_formats]):
        version, pin = _version(name), PINS.get(name)
        tested = None if version is None or pin is None else is_tested(version, pin)
        found.append({"name": name, "version": version, "tested": tested, "wanted": list(pin.tested) if pin else []})
    return found


def _extras() -> list[dict[str, Any]]:
    """missing: modules that the extra would install."""
    from mptrain.recipe import EXPORTS

    found = [
        {
            "name": spec.extra,
            "adds": f"export to {spec.title}",
            "missing": [p.name for p in spec.packages if p.needed and not _importable(p.module)],
        }
        for spec in EXPORTS.values()
        if spec.extra
    ]
    others = [
        ("optimum", "optimum.intel", "loading OpenVINO exports in optimum-intel"),
        ("plots", "matplotlib", "figures in reports"),
        ("gguf", "gguf", "packaged:smollm2-135m"),
        ("seq2seq", "sacrebleu", "scores of texts that a model writes"),
    ]
    for name, module, adds in others:
        found.append({"name": name, "adds": adds, "missing": [] if _importable(module) else [module]})
    return found


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["Apple GPU (MPS)"] if torch.backends.mps.is_available() else []


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as text for a terminal."""
    host = found["host"]
    cores = f"{host['cores_usable']} of {host['cores']} cores"
    text = [
        f"mptrain   {found['mptrain'] or 'not installed'}, Python {host['python']} on {host['os']}",
        f"CPU       {host['cpu']}, {cores}, {host['ram_bytes'] / 2**30:.0f} GiB",
        f"          {' '.join(host['cpu_flags']) or 'its flags are not known'}",
        f"GPU       {', '.join(found['gpus']) or 'none'}",
        f"compiler  {found['compiler'] or 'none: quantization-aware training and k-means run on torch, slower'}",
        f"cache     {found['cache']}",
        "",
    ]
    for package in found["packages"]:
        version = package["version"]
        state = {None: "", True: "tested", False: f"not tested, {' or '.join(package['wanted'])} is"}[package["tested"]]
        text.append(f"{package['name']:<14}{version or 'not installed':<16}{state if version else ''}".rstrip())
    text.append("")
    for extra in found["extras"]:
        how = f"missing {', '.join(extra['missing'])}: pip install 'mptrain[{extra['name']}]'"
        text.append(f"{extra['adds']:<22}{how if extra['missing'] else 'ready'}")
    return [*text, "", *advice(found)]


def advice(found: dict[str, Any]) -> list[str]:
    """What to expect of this machine, a sentence each."""
    fast, gpu = found["fast"], bool(found["gpus"])
    int8 = (
        "int8 exports will be fast here: the CPU has int8 dot products."
        if fast["int8"]
        else "int8 makes models smaller here, not faster (no int8 dot products); pruning makes them faster."
    )
    kinds = [name for name in ("bf16", "fp16") if fast[name] or (gpu and name == "fp16")]
    half = (
        f"Training in {' or '.join(kinds)} may be faster; `mptrain inspect MODEL` times it."
        if kinds or gpu
        else "Half-precision training saves memory here, not time: the CPU has no half-precision matrix units."
    )
    known = found["host"]["cpu_flags"] or platform.machine().lower() in ("arm64", "aarch64")
    return [int8, half] if known else [half]
