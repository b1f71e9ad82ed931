# make demo   sets up .venv and runs the main job: prune, quantize and distil a BERT, export, measure, report
# make test   sets up .venv and runs the tests
# make docs   builds the site of docs/ into site/
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch from another index
TORCH_INDEX ?=
# tests at a time in make test-all
JOBS ?= 1
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-package test-all soak lint docs setup-bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; use make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: setup
	$(BIN)/mptrain recipe jpqd-bert.yaml

# 10,000 broken recipes and some 700 damaged files; a repeated command continues
SOAK := benchmarks/results/soak-$(shell date +%Y-%m-%d).json

soak: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m benchmarks.soak --json $(SOAK)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

# sdist and wheel; the main job made small from the installed wheel in an empty folder
test-package: setup
	$(BIN)/python -m pytest -p no:xdist -m long tests/commands/test_package.py

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/test_all.py --jobs $(JOBS)

# core tests on the lowest and newest versions, on every Python here; a folder to each below build/lanes
lanes: setup
	$(BIN)/python -m scripts.lanes

.venv-docs/.ready: constraints.txt
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt mkdocs-material mkdocstrings-python
	@touch $@

docs: setup .venv-docs/.ready
	rm -rf build/recipe-pages
	$(BIN)/python scripts/recipe_pages.py build/recipe-pages
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict -q

.venv-bench/.ready: benchmarks/requirements.txt benchmarks/requirements-gradnas.txt pyproject.toml constraints.txt
	test -x .venv-bench/bin/pip || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	.venv-bench/bin/python -m pip install -q -c constraints.txt -e ".[all]"
	.venv-bench/bin/python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt
	rm -rf .venv-bench/gradnas
	.venv-bench/bin/python -m pip install -q --no-deps --target .venv-bench/gradnas -r benchmarks/requirements-gradnas.txt
	@touch $@

setup-bench: .venv-bench/.ready

clean:
	rm -rf $(VENV) .venv-bench .venv-docs build dist site
