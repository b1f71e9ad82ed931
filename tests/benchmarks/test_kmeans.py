"""The k-means benchmark runs and tells the truth, on a small weight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_rows_of_the_benchmark(tmp_path):
    command = [sys.executable, "-m", "benchmarks.weights.kmeans", "--json", tmp_path / "out.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--rows", "heavy/4b/g4/*", "--size", "128", "--rounds", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["threads"] == 1 and {"host", "versions"} <= set(result)
    assert [r["name"] for r in result["rows"]] == ["heavy/4b/g4/unweighted", "heavy/4b/g4/weighted"]
    for row in result["rows"]:
        assert 0.999 < row["sse_over_exact"] < 1.005
        assert row["sse_over_coremltools"] < 1.005 and row["speedup"] > 0
    assert "heavy/4b/g4/weighted" in (tmp_path / "out.md").read_text()
