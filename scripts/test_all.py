"""Run the tests marked `long` file by file, resumable, and commit a dated result.

Each file is its own process, each test has its own time limit; what a process that died left is run test by test.
Results are kept in .test-all/ under the commit they ran on; a second call runs only what is missing or failed. When
all have run, benchmarks/results/test-all-DATE.json names the commit, and is committed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the long tests, resumable, and commit a dated result.")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time (default 1)")
    options = parser.parse_args()
    if git("status", "--porcelain", "--untracked-files=no"):
        print("test-all: commit your changes first; the result names the commit it ran on", file=sys.stderr)
        return 2
    commit = git("rev-parse", "HEAD")
    store = ROOT / ".test-all" / f"{commit}.json"
    store.parent.mkdir(exist_ok=True)
    results = json.loads(store.read_text()) if store.is_file() else {}
    pytest = [sys.executable, "-m", "pytest"]
    # one -q, whatever pyproject adds: with two, pytest prints counts instead of names
    collect = [*pytest, "-o", "addopts=-q", "--collect-only", "-m", "long"]
    listed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if not tests:
        print(listed.stdout + listed.stderr, file=sys.stderr)
        return 1
    left: dict[str, list[str]] = {}
    for test in tests:
        if results.get(test, {}).get("outcome") != "passed":
            left.setdefault(test.split("::")[0], []).append(test)
    lock = threading.Lock()

    def run(chosen: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [*pytest, "-m", "long", "-p", "no:xdist", "-p", "scripts.outcomes", "--show-capture=no", *chosen]
            environment = os.environ | {"MPTRAIN_OUTCOMES": str(report)}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            found = json.loads(report.read_text()) if report.is_file() else {}
        missing = [test for test in chosen if test not in found]
        if missing == chosen and len(chosen) == 1:
            found, missing = {chosen[0]: {"outcome": "failed", "seconds": None}}, []
        with lock:
            results.update(found)
            for test in found:
                print(f"[{len(results)}/{len(tests)}] {found[test]['outcome']} {test}", flush=True)
            if any(each["outcome"] == "failed" for each in found.values()):
                print(done.stdout[-6000:] + done.stderr[-1000:], flush=True)
            temporary = store.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1))
            os.replace(temporary, store)
        for test in missing:
            run([test])

    pool = ThreadPoolExecutor(options.jobs)
    try:
        list(pool.map(run, left.values()))
    finally:  # after Ctrl-C too
        pool.shutdown(cancel_futures=True)
    failed = [t for t, r in results.items() if r["outcome"] != "passed"]
    today = datetime.date.today().isoformat()
    report = ROOT / "benchmarks" / "results" / f"test-all-{today}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit, "date": today, "python": platform.python_version(), "machine": platform.machine()}
    facts |= {"passed": len(results) - len(failed), "failed": failed, "tests": results}
    report.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    git("add", str(report))
    if git("diff", "--cached", "--name-only"):
        git("commit", "-m", f"Long tests at {commit[:12]}: {len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
