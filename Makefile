# Every target makes its own .venv when there is none, or when setup.py or constraints.txt changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin
STAMP := .venv/.installed
LIBTPU := .venv/libtpu/.installed
# glibc then asks for huge pages: programs of XLA:CPU take new memory in every step, and a sixth of a
# small step went to page faults. Elsewhere it means nothing.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

.DEFAULT_GOAL := help
.PHONY: help run test-fast test test-slow test-long drill lint docs libtpu clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(STAMP)  ## Train a tiny MM1 on the sample data, ask it about pictures, write runs/demo.
	$(BIN)/python -m launch.demo --workdir=runs/demo

# A file's tests share compiled programs, so a process takes whole files.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile

test-fast: $(STAMP)  ## Run the tests that compile no model: config, data, commands, docs. Under a minute.
	$(PYTEST) -m 'not slow and not long and not compiles'

test: $(STAMP) $(LIBTPU)  ## Run all tests but the slow ones.
	$(PYTEST)

test-slow: $(STAMP) $(LIBTPU)  ## Run the slow tests: whole runs, all meshes; SLOW_SHARD=1/4, a part of them.
	$(BIN)/python -m pytest -n 2 -m slow || test $$? -eq 5  # 5: there are none

test-long: $(STAMP)  ## Run the tests that CI leaves out: several processes that train and die, the notebook.
	$(BIN)/python -m pytest -m long

drill: $(STAMP)  ## Inject faults into the commands, and say what each did; DRILL_FLAGS=--quick, a part.
	$(BIN)/python -m tests.drill $(DRILL_FLAGS)

lint: $(STAMP)  ## Check style, formatting and types.
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

docs: $(STAMP)  ## Build the site of docs/ into site/, with warnings as errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

libtpu: $(LIBTPU)  ## Bring the TPU compiler, for plans on a machine without a TPU (200 MB).

clean:  ## Remove .venv, caches and builds; runs/ stays.
	rm -rf .venv .pytest_cache .ruff_cache build site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "mm1_jax needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version): one to three minutes, this time only."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  -c constraints.txt -e '.[dev]' 2>&1 | \
	  sed -u -n 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing collected.*/  installing them/p; /^ *ERROR/,$$p'
	@touch $@
	@echo "Set up."

# Beside the other packages: where JAX can import it, every program without a TPU complains of it.
# Without a wheel for this machine, the tests that need it are skipped and say so.
$(LIBTPU): $(STAMP) constraints.txt
	@echo "Bringing libtpu, the TPU compiler (200 MB), this time only."
	@mkdir -p $(@D)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --upgrade \
	  --no-deps --target $(@D) -c constraints.txt libtpu || echo "There is none for this machine."
	@touch $@
