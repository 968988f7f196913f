# Two commands do everything, set-up included:
#   make demo   render a small world, train on it, generate videos, write a report
#   make test   lint, types and the whole test suite
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's CPU build (about 200 MB)
# instead of the one that PyPI offers (on Linux: several GB of CUDA libraries).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version that the tests ran with; any torch >= 2.11 works.
TORCH_SPEC ?= torch==2.13.0
# Passed on to `kinema demo`: make demo DEMO_ARGS="--videos my_clips"
DEMO_ARGS ?=
# Threads that spin while they wait make a busy two-core machine 3-20 times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types unit install clean

demo: $(VENV)/.installed
	$(BIN)/kinema demo $(DEMO_ARGS)

test: lint types unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude "*.md" .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# One thread a test process: two workers on two cores must not fight for them.
unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Kinema needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
