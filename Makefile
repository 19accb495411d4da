# The front door. `make demo` and `make test` do everything that they need, from a fresh clone on.
PYTHON ?= python3
PY = $(shell cat build/env/python)
FORMATTERS = 'ruff==0.17.*' 'clang-format==23.*'
PYTEST = $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help env build demo test test-slow test-all test-asan lint format bench wheel clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build/env/python env: ## the environment and the native module (everything below needs it)
	@$(PYTHON) tools/bootstrap.py

build: env ## the same as env

demo: env ## watch one checkpoint think at a small width and answer at a large one
	@$(PY) -m elastic_infer.cli demo $(DEMO_ARGS)

test: env ## the tests: at most 10 minutes on 2 cores
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-slow: env ## the tests that take minutes each
	$(PYTEST) -m slow $(TEST_ARGS)

test-all: test test-slow ## all tests

test-asan: env ## the ops under AddressSanitizer and UBSan
	PYTHON=$(PY) bash tests/sanitize.sh

lint: env ## style of Python and C++, without changing anything
	@$(PY) -m ruff --version >/dev/null 2>&1 || $(PY) -m pip install -q $(FORMATTERS)
	$(PY) -m ruff check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(dir $(PY))clang-format --dry-run --Werror

format: env ## format Python and C++
	$(PY) -m ruff check --fix .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(dir $(PY))clang-format -i

bench: env ## one row per op, with the roof measured in the same run
	$(PY) bench/ops.py

wheel: env ## a wheel in dist/
	$(PY) -m pip wheel --no-deps --no-build-isolation -w dist .

clean: ## forget what was built, keep .venv
	rm -rf build/cmake build/env build/temp.* build/lib.* dist *.egg-info elastic_infer/_C*.so

include bench/peer.mk
