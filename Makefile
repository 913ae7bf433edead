# Each target sets up what it needs on a bare machine: a virtual environment in .venv, PyTorch, Plait.
# PyTorch comes first and in its own call, so that the index in use decides which build it is; the
# version is pinned here for repeatable figures, not in pyproject.toml.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
# Two processes that both spin on every core run slower than either alone.
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-fast lint bench docs clean

quickstart: $(VENV)/demo
	$(BIN)/plait quickstart

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n auto

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest -n auto -m "not slow and not smollm2"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python benchmarks/run_all.py

docs: $(VENV)/dev
	$(BIN)/python docs/generate.py

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) build dist
