"""Measured claims, each a command from the repository root: `python -m benchmarks.FOLDER.NAME`; see README.md."""
