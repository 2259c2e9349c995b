# The two commands: `make demo` and `make test`. They set up what they need in .venv; nothing finished is done again.

# The Python that .venv is made with: 3.11 or newer.
PYTHON ?= python3
# Where the environment is; empty (`VENV=`): $(PYTHON) itself is used as it is and nothing is installed.
VENV ?= .venv
# Versions for a machine without a GPU; empty (`CONSTRAINTS=`) on one with a GPU.
CONSTRAINTS ?= constraints-cpu.txt
# More for pip, such as `--extra-index-url https://download.pytorch.org/whl/cpu`.
PIP_ARGS ?=
# Test processes at a time, one thread and about 1 GB of memory each.
WORKERS ?= 2
# More for the command itself, as in `make demo ARGS="--work /tmp/demo"` or `make test ARGS="-k compress"`.
ARGS ?=

ifdef VENV
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
else
PY := $(PYTHON)
endif

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all gpu lint format typecheck clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with everything in it (the other targets do it themselves)

# Brought up to date when the dependencies change, with the Python that it was made with: another one would break it.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"error: $(PYTHON) is Python {v[0]}.{v[1]}, but 3.11 or newer is needed: name one, as in make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install $(PIP_ARGS) $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@

demo: $(READY) ## the main job on a real small model: fetch, plan, convert, verify, train, generate, card
	$(PY) -m nsa_hf.recipes.cli demo $(ARGS)

test: $(READY) ## the tests
	$(PYTEST) $(ARGS)

test-all: $(READY) ## the tests and the slow ones
	$(PYTEST) -m 'not gpu' $(ARGS)

gpu: $(READY) ## what needs a CUDA GPU: tests, then the benchmarks; `VENV=` uses a Python that has PyTorch
	$(PY) .ci/gpu.py $(ARGS)

lint: $(READY) ## style, as CI checks it
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## bring the style in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(READY) ## types, as CI checks them
	$(PY) .ci/typecheck.py

clean: ## remove what was built and .venv; what the demo made stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
