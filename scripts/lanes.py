"""Core tests on the lowest and the newest versions that pyproject.toml allows, on every Python that is installed.

    python -m scripts.lanes [--json FILE] [--venvs FOLDER] [--only NAME…] [--tests TEST…]

A lane is a Python and `lowest` or `newest`: an environment of its own, filled by pip, and the core tests in it. Before
them every extra is resolved by itself, without being installed: an extra that holds another package back is seen there.
The JSON has the date, the versions of each lane, and the names of tests that failed; lanes of other names that a file
has already are kept. An environment that is there is used again. TORCH_INDEX: where torch comes from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SHOWN = ("torch", "transformers", "accelerate", "datasets", "numpy", "nncf", "openvino", "onnxruntime", "pydantic")
EXTRAS = {"lowest": ("openvino", "onnx", "coreml"), "newest": ("openvino", "onnx", "coreml", "coreai")}
"""of a lane: what the core tests import; coreai itself needs newer torch (2.8) and numpy (2.3) than mptrain does"""
TESTS = (
    "tests/core/test_pins.py",
    "tests/compress/test_dataflow.py",
    "tests/compress/test_quantizers.py",
    "tests/compress/test_weight_only.py",
    "tests/models/test_artifact.py",
    "tests/precision/test_loop.py",
    "tests/recipe",
    "tests/train/test_trainer.py",
    "tests/train/test_trainer_precision.py",
    "tests/api",
)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest(extras: tuple[str, ...], version: str) -> list[str]:
    """The least versions of what mptrain and the extras require on a Python, as pip reads them."""
    found = project()
    named = [*found["dependencies"], *(one for extra in extras for one in found["optional-dependencies"][extra])]
    pinned = []
    for requirement in map(Requirement, named):
        if requirement.marker and not requirement.marker.evaluate({"python_version": version}):
            continue
        least = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==")]
        if least:
            pinned.append(f"{requirement.name}=={least[0]}{'.*' if least[0].count('.') == 1 else ''}")
    return pinned


def interpreters() -> Iterator[tuple[str, str]]:
    """Of PYTHONS those that run here, with their paths; pyenv's too, which are on no path."""
    for version in PYTHONS:
        kept = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
        places = filter(None, [shutil.which(f"python{version}"), *map(str, reversed(kept))])
        # pyenv's command of a version that it was not told to use is there, and fails
        runs = (p for p in places if subprocess.run([p, "-c", "import venv"], capture_output=True).returncode == 0)
        if (path := next(runs, None)) is not None:
            yield version, path


def resolved(python: Path, extra: str) -> dict[str, Any]:
    """What pip would install for an extra alone, with the newest of everything else."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        wanted = f"{ROOT}[{extra}]"
        command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", report, wanted]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            return {"extra": extra, "resolves": False, "error": done.stderr.strip()[-400:]}
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in items}
    return {"extra": extra, "resolves": True, "versions": {n: versions[n] for n in SHOWN if n in versions}}


def lane(name: str, version: str, path: str, venvs: Path, tests: list[str]) -> dict[str, Any]:
    """name: ends with lowest or newest. Raises CalledProcessError where the environment cannot be made."""
    begun = time.monotonic()
    folder = venvs / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([path, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    kind = name.rpartition("-")[2]
    extras = EXTRAS[kind]
    pins = lowest(extras, version) if kind == "lowest" else []
    index = ["--index-url", url] if (url := os.environ.get("TORCH_INDEX")) else []
    torch = next((pin for pin in pins if pin.startswith("torch==")), "torch")
    subprocess.run([*install, *index, torch], check=True)
    needed = ["pytest", "pytest-timeout", "hypothesis", "peft"]
    subprocess.run([*install, "-e", f"{ROOT}[{','.join(extras)}]", *needed, *pins], check=True)
    report = folder / "tests.xml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    status = subprocess.run([*command, *tests], cwd=ROOT, env=environment).returncode
    found = _results(report)
    if status > 1:  # no test failed, but pytest did
        found["failed"].append(f"pytest ended with status {status}")
    return {
        "lane": name,
        "python": version,
        "extras": list(extras),
        "versions": _versions(python),
        **found,
        "tests": tests,
        "seconds": round(time.monotonic() - begun),
    }


def _versions(python: Path) -> dict[str, str]:
    done = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    )
    installed = {row["name"].lower(): row["version"] for row in json.loads(done.stdout)}
    return {name: installed[name] for name in SHOWN if name in installed}


def _results(report: Path) -> dict[str, Any]:
    """{"passed", "skipped", "failed": [names with the first line of the error]}; a lane without a report broke."""
    if not report.is_file():
        return {"passed": 0, "skipped": 0, "failed": ["pytest wrote no report"]}
    passed = skipped = 0
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        if wrong is not None:
            said = (wrong.get("message") or "").strip().splitlines()
            failed.append(f"{case.get('classname')}::{case.get('name')}: {(said or [''])[0][:200]}")
        elif any(child.tag == "skipped" for child in case):
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.lanes", description=(__doc__ or "").partition("\n")[0])
    today = datetime.date.today().isoformat()
    parser.add_argument("--json", type=Path, default=ROOT / f"benchmarks/results/lanes-{today}.json")
    parser.add_argument("--venvs", type=Path, default=ROOT / "build/lanes", help="where the environments are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="lanes such as 3.12-newest; default: all")
    parser.add_argument("--resolve", action="store_true", help="resolve the extras and run no tests")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="default: the core tests")
    options = parser.parse_args()
    found = list(interpreters())
    known = [f"{version}-{kind}" for version, _ in found for kind in EXTRAS]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    facts = {"date": today, "pythons": [version for version, _ in found], "extras": kept.get("extras", [])}
    lanes = {row["lane"]: row for row in kept.get("lanes", [])}
    if options.resolve or not options.only:
        extras = [name for name in project()["optional-dependencies"] if name != "dev"]
        facts["extras"] = [resolved(Path(sys.executable), extra) for extra in extras]
    for version, path in found:
        for name in (f"{version}-{kind}" for kind in EXTRAS):
            if options.resolve or (options.only and name not in options.only):
                continue
            try:
                lanes[name] = lane(name, version, path, options.venvs, options.tests)
            except subprocess.CalledProcessError as error:
                said = re.sub(r"\S*/(?=\S)", "", " ".join(map(str, error.cmd)))[:300]
                lanes[name] = {"lane": name, "python": version, "failed": [f"no environment: {said}"]}
            write(options.json, facts | {"lanes": list(lanes.values())})
    write(options.json, facts | {"lanes": list(lanes.values())})
    failed = [row["lane"] for row in lanes.values() if row["failed"]]
    failed += [row["extra"] for row in facts["extras"] if not row["resolves"]]
    print(*(f"{name}: failed" for name in failed), f"{options.json} written", sep="\n")
    return 1 if failed else 0


def write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
