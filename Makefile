# Every target that needs the environment makes it first. Try `make`.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow lint format bench clean

help:  ## Show the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | \
	  awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKDIR=$(WORKDIR)'

install: $(STAMP)  ## Make the virtual environment with all dependencies.

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit( \
	  None if (3, 11) <= v <= (3, 13) else \
	  "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)  ## Train a small NFNet on handwritten digits and show the result.
	$(BIN)/python -m nfnets_jax.main --config=experiments/digits.py --workdir=$(WORKDIR)

test: $(STAMP)  ## Run the fast tests and the examples of the docstrings.
	$(BIN)/python -m pytest -m 'not slow' --numprocesses=auto --maxprocesses=8 --dist=loadfile

test-slow: $(STAMP)  ## Run the slow tests.
	$(BIN)/python -m pytest -m slow tests

lint: $(STAMP)  ## Check style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Time a gradient step beside the released formulation.
	$(BIN)/python -m experiments.benchmarks.gradient_step

clean:  ## Remove the environment and caches; runs and data stay.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
