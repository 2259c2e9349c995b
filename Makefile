# The two commands: `make demo` and `make test`. They set up what they need in .venv; nothing finished is done again.

# The Python that .venv is made with: 3.11 or newer.
PYTHON ?= python3
# Where the environment is; empty (`VENV=`): $(PYTHON) itself is used as it is and nothing is installed.
VENV ?= .venv
# The versions that were tested; empty (`CONSTRAINTS=`): the newest.
CONSTRAINTS ?= constraints.txt
# More for pip, such as `--extra-index-url https://download.pytorch.org/whl/cpu`.
PIP_ARGS ?=
# Test processes at a time, one thread and about 1 GB of memory each.
WORKERS ?= 2
# For `test-newest` and `test-oldest`: packages to leave out of the set, and an environment that has them (CI: `torch`, whose
# builds for CUDA are gigabytes, and `.venv`).
WITHOUT ?=
OVER ?=
# More for the command itself, as in `make demo ARGS="--work /tmp/demo"` or `make test ARGS="-k compress"`.
ARGS ?=

ifdef VENV
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
else
PY := $(PYTHON)
endif

PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz test-newest test-oldest test-common gpu lint format typecheck dist hub-kernel api clean

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

fuzz: $(READY) ## 10,000 random cases against the reference; `ARGS="--cases 500 --seed 7"` for others
	OMP_NUM_THREADS=1 $(PY) tests/fuzz.py $(ARGS)

test-common: $(READY) ## Transformers' own tests of models, against the sparse classes; some minutes
	$(PY) .ci/common $(ARGS)

test-newest: $(READY) ## the tests with the newest release of every package, in .venv-newest
test-oldest: $(READY) ## the tests with every lower bound of pyproject.toml, in .venv-oldest
test-newest test-oldest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(PY) .ci/versions.py $* $(WITHOUT) > .venv-$*/requirements.txt
	$(if $(OVER),$(OVER)/bin/python -c '$(SITE)' > "$$(.venv-$*/bin/python -c '$(SITE)')/over.pth")
	.venv-$*/bin/python -m pip install -q $(PIP_ARGS) --upgrade -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	$(MAKE) --no-print-directory test VENV= PYTHON=.venv-$*/bin/python

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

dist: $(READY) ## wheel and source distribution of the last commit in dist/, built and checked
	$(PY) .ci/dist.py dist

hub-kernel: $(READY) ## the operation as a kernel of Hugging Face's Hub, in build/hub-kernel
	$(PY) .ci/hub_kernel.py build/hub-kernel

api: ## docs/api.md anew from the docstrings
	$(PYTHON) .ci/api.py

clean: ## remove what was built and .venv; what the demo made stays
	rm -rf .venv .venv-newest .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
