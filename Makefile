PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the tested versions (again only when they change)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lora]'
	@command -v bwrap >/dev/null || echo "no bubblewrap: rewards that run code need it (apt install bubblewrap)"
	touch $@

demo: setup  ## train a tiny policy, with its curve before your eyes
	$(BIN)/python benchmarks/demo.py

test: setup  ## run the tests that need neither an accelerator nor patience
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: setup  ## check style, format, import layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

types: setup  ## check the types alone
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## sort the imports, mend what ruff can, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## run every benchmark but bench_learning (a day); they write to benchmarks/results/, or print
	@set -e; for script in benchmarks/bench_*.py; do \
		[ $$script = benchmarks/bench_learning.py ] || $(BIN)/python $$script; done

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
