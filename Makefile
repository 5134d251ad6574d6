PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
BUILD = build/$(shell $(BIN)/python -c "import sys, importlib.metadata as m; \
	print(sys.implementation.cache_tag + '-torch-' + m.version('torch'))")
RECIPE := recipes/quickstart/listops.yaml
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help venv build test lint demo debian

help: ## show this list
	@grep -hE '^[a-z0-9]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(BIN)/ninja
$(BIN)/ninja:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0 "setuptools>=77" "cmake>=3.24" ninja

build: venv debian ## build and install into .venv, editable, with tests and tools (as root, apt-get installs Catch2 and qemu)
	CMAKE_ARGS=-DSPADE_EXT_TESTS=ON $(BIN)/pip install -q --no-build-isolation -e ".[dev]"

test: build ## build and run every test, Catch2 and Python
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/pytest -n $(JOBS)

lint: $(BIN)/ruff ## check ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

# Their versions stand in pyproject.toml.
$(BIN)/ruff: | $(BIN)/ninja
	$(BIN)/pip install -q $$(sed -nE 's/.*"((ruff|clang-format)==[^"]+)".*/\1/p' pyproject.toml)

demo: venv ## build, then train and evaluate a SPADE on ListOps in minutes
	$(BIN)/pip install -q --no-build-isolation -e ".[train]"
	$(BIN)/spade-ext data $(RECIPE)
	$(BIN)/spade-ext train $(RECIPE) training.output_dir=$(RUN)
	$(BIN)/spade-ext evaluate $(RUN)

# Test dependencies that PyPI does not have: Catch2, and qemu, which runs the ops on older CPUs. Without apt or root,
# CMake says how to get Catch2, and the tests that want qemu are skipped.
debian:
	@{ ls /usr/include/catch2 /usr/local/include/catch2 >/dev/null 2>&1 && command -v qemu-x86_64 >/dev/null; } \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && apt-get update -qq && apt-get install -y -qq catch2 qemu-user >/dev/null; } || true
