# make demo   a real sweep on the embedded language model, start to finish
# make test   the tests
# Both set up .venv by themselves.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all setup setup-test check clean

demo: .venv/.runtime
	$(BIN)/penstock run jobs/specs/demo.yaml

# Files of tests side by side, one thread each, but for those on the shared Ray cluster, which need the cores.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/.test
	$(SIDE_BY_SIDE) -m "not slow and not ray"
	$(BIN)/python -m pytest -m "ray and not slow"

test-all: .venv/.test
	$(SIDE_BY_SIDE) -m "not ray"
	$(BIN)/python -m pytest -m ray

check: .venv/.test
	$(BIN)/python -m ruff check .
	$(MAKE) test

setup: .venv/.runtime
setup-test: .venv/.test

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and by its pinned version, so that no other package's range picks another build.
.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.test: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,compat]" ruff
	@touch $@

clean:
	rm -rf .venv
