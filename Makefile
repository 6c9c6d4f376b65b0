# Everything that a contributor needs; each target makes its own virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help install dev demo test lint format benchmarks clean

help:
	@echo "make demo        prune the embedded model and show what is left (about a minute)"
	@echo "make test        run the tests (offline)"
	@echo "make lint        ruff (format and rules) and mypy"
	@echo "make format      apply ruff's format and fixes"
	@echo "make benchmarks  measure speed side by side; results go to benchmarks/results"
	@echo "make clean       remove the virtual environment and caches"

install: $(VENV)/installed
dev: $(VENV)/installed-dev

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/shape-moe demo

test: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
