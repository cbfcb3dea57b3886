# The two commands, demo and test, need Python 3.12 or newer and nothing else.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test quick lint bench clean

demo: $(VENV)/.examples
	$(BIN)/python -m msbp_jax.demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.aot
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=msbp_jax --cov-report=term:skip-covered $(ARGS)

# While working: every folder of the package, in about three minutes on two cores. Left out is what is marked slow, which
# `make test` has: other chips and their compilers, other processors and processes, sanitizers, files, examples, the zoo of
# Flax's modules, draws of keys, and large grids whose corners a smaller test has too. Benchmarks have tests of their own.
# ARGS="tests/memory" runs a folder.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore tests/benchmarks $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.examples
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.12 or newer was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@

# Compilers of TPUs and GPUs, to compile for chips that this machine has not; beside the environment, as JAX would try to
# start them. Both come for Linux on x86-64 and arm64; elsewhere their tests are skipped. They are made for one JAX.
$(VENV)/.aot: $(VENV)/.dev
	@if [ "$$(uname -s)" = Linux ]; then \
		jaxlib=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)'); \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/aot \
			libtpu jax-cuda13-plugin==$$jaxlib jax-cuda13-pjrt==$$jaxlib; \
	fi
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
