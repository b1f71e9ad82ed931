"""`mptrain doctor` says what is here, what was tested, and what will be fast."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from mptrain.cli import main
from mptrain.commands import doctor
from mptrain.core import host


def test_this_machine(capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "doctor.json").read_text())
    torch = next(p for p in found["packages"] if p["name"] == "torch")
    assert torch == {"name": "torch", "version": metadata.version("torch"), "tested": True, "wanted": ["2.13"]}
    assert f"torch         {torch['version']}" in shown and host.host()["cpu"] in shown
    assert all(not extra["missing"] for extra in found["extras"] if extra["name"] in ("openvino", "coreml", "coreai"))
    assert main(["doctor", "--json", str(tmp_path / "no" / "doctor.json")]) == 2


def test_what_is_missing_or_untested_is_named_with_the_command(monkeypatch, capsys):
    installed = metadata.version

    def version(name):
        if name == "coremltools":
            raise metadata.PackageNotFoundError(name)
        return "3.9.1" if name == "nncf" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_importable", lambda module: module != "coremltools")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["coremltools", "not", "installed"] for line in shown)
    assert any(line.startswith("nncf") and line.endswith("not tested, 3.4 is") for line in shown)
    assert any("Core ML" in line and "pip install 'mptrain[coreml]'" in line for line in shown)


@pytest.mark.parametrize(
    ("flags", "int8", "half"),
    [
        (["avx2", "fma"], "not faster", "not time"),
        (["avx2", "avx512_vnni"], "will be fast", "not time"),
        (["avx2", "avx512_vnni", "amx_bf16"], "will be fast", "Training in bf16"),
        (["asimd", "asimddp", "asimdhp"], "will be fast", "Training in fp16"),
    ],
)
def test_what_will_be_fast(flags, int8, half):
    said = doctor.advice({"host": {"cpu_flags": flags}, "fast": host.fast(flags), "gpus": []})
    assert int8 in said[0] and half in said[1]
