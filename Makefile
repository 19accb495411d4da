# The front door. `make demo` and `make test` do everything that they need, from a fresh clone on.
PYTHON ?= python3
PY = $(shell cat build/env/python)
FORMATTERS = 'ruff==0.17.*' 'clang-format==23.*'
SITE = 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0,<2' 'ruff>=0.6'
PYTEST = $(PY) -m pytest

.DEFAULT_GOAL := help
EMU = $(PY) tools/progress.py "the emulated kernels" $(dir $(PY))cmake --build build/emu --target _emu -j2
.PHONY: help env build cuda demo emu test test-loaded test-emu test-emu-asan test-slow test-all test-asan ptxas lint format docs bench gpu-check wheel clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build/env/python env: ## the environment and the native module (everything below needs it)
	@$(PYTHON) tools/bootstrap.py

build: env ## the same as env

cuda: env ## the native module with CUDA kernels, GPU or not (CUDA_ARGS=-DELASTIC_CUDA_ARCHS=90a: one card)
	CMAKE_ARGS="-DELASTIC_CUDA=ON $(CUDA_ARGS)" $(PY) setup.py build_ext --inplace

demo: env ## watch one checkpoint think at a small width and answer at a large one
	@$(PY) -m elastic_infer.cli demo $(DEMO_ARGS)

emu: env ## the CUDA kernels on an emulated GPU, for the tests
	@$(dir $(PY))cmake -S . -B build/emu -DELASTIC_EMULATE=ON -DPython_EXECUTABLE=$(PY) \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) >/dev/null
	@$(EMU)

test: env emu ## the tests: at most 10 minutes on 2 cores
	$(PYTEST) -m "not slow" $(TEST_ARGS)

LOADED = $(addprefix engine/test_,engine limits sequences ahead streams bad_requests interrupts) \
  scheduling plans project/test_examples
test-loaded: env emu ## the engine's tests, three times beside four busy loops: none depends on pace
	$(PY) tools/loaded.py $(PYTEST) -x -m "not slow" $(wildcard $(LOADED:%=tests/%) $(LOADED:%=tests/%.py)) $(TEST_ARGS)

test-emu: env emu ## only the tests of the CUDA kernels, emulated
	$(PYTEST) tests/cuda -m "not slow" $(TEST_ARGS)

# Not all of `test-emu`: of the small cases law 1 alone. Its tensors have their exact size, so that what
# is out of bounds is found; the other laws run the same kernels again, for many minutes more.
test-emu-asan: env ## the CUDA kernels, emulated, under AddressSanitizer and UBSan
	@$(dir $(PY))cmake -S . -B build/emu-asan -DELASTIC_EMULATE=ON -DELASTIC_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) >/dev/null
	@$(subst build/emu,build/emu-asan,$(EMU))
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 EMU_BUILD=build/emu-asan \
	  $(PYTEST) tests/cuda/test_cuda_ops.py::test_reference tests/cuda/test_cuda_shapes.py \
	  tests/cuda/test_ssm_segments.py tests/cuda/test_w4a4.py tests/cuda/test_wgmma.py tests/cuda/test_emulator.py \
	  --deselect tests/cuda/test_emulator.py::test_fibers_without_assembly $(TEST_ARGS)

test-slow: env emu ## the tests that take minutes each
	$(PYTEST) -m slow $(TEST_ARGS)

test-all: test test-slow ## all tests

test-asan: env ## the ops under AddressSanitizer and UBSan
	PYTHON=$(PY) bash tests/support/sanitize.sh

ptxas: env ## registers and spills of every CUDA kernel, for all architectures (needs nvcc, no GPU)
	$(PY) -m bench.gpu.ptxas

lint: env ## style of Python and C++, without changing anything
	@$(PY) -m ruff --version >/dev/null 2>&1 || $(PY) -m pip install -q $(FORMATTERS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(dir $(PY))clang-format --dry-run --Werror

format: env ## format Python and C++
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format -q .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(dir $(PY))clang-format -i

docs: env ## the pages that come from code and data, and the site in site/ (strict)
	@$(PY) -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(PY) -m pip install -q $(SITE)
	$(PY) -m bench.tables.pages --check
	$(PY) -m docs.generate --check
	$(PY) -m docs.pictures.draw --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: env ## one row per op, with the roof measured in the same run
	$(PY) -m bench.cpu.ops

gpu-check: ## everything about the CUDA kernels on the GPU at hand, with $PYTHON as it is
	@$(PYTHON) -m bench.gpu.run $(GPU_ARGS)

wheel: env ## a wheel in dist/
	$(PY) -m pip wheel --no-deps --no-build-isolation -w dist .

clean: ## forget what was built, keep .venv
	rm -rf build/cmake build/emu build/emu-asan build/env build/temp.* build/lib.* dist site *.egg-info elastic_infer/_C*.so

include bench/llama/llama.mk
