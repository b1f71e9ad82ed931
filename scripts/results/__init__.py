"""Write docs/results.md, and the tables in README.md and docs/jpqd.md, from benchmarks/results: `python -m
scripts.results`.

`--check` only compares. Every number that the project claims of speed, size or accuracy is drawn here and nowhere
else, so it stands once and is what was measured.
"""
