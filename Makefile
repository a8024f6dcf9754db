# make demo   a real sweep on the embedded language model, start to finish
# make test   the tests
# Both set up .venv by themselves.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all setup setup-test check clean

demo: .venv/.runtime
	$(BIN)/penstock run jobs/specs/demo.yaml

test: .venv/.test
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.test
	$(BIN)/python -m pytest

check: .venv/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -m "not slow"

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
