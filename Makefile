# make demo | test | lint | gpu-check | bench-cpu | cuda | clean. The first call sets up .venv and builds bsfa into it.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT := $(BIN)/clang-format

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cpp lint format gpu-check bench-cpu cuda clean

help:
	@sed -n '1p' Makefile

# A torch that the machine already has (with its CUDA) is used as it is; else TORCH is installed.
$(BIN)/python:
	@if $(PYTHON) -c "import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q "$(TORCH)"; fi

$(VENV)/.tools: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/.built: $(CSRC) csrc/sources.json setup.py pyproject.toml VERSION $(VENV)/.tools $(VENV)/.cutlass
	$(BIN)/pip install -q --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.built
	$(BIN)/pip install -q ruff mypy clang-format
	@touch $@

# CUTLASS's headers, for the CUDA kernels: those that find_cutlass.py finds, else from PyPI (6 MB).
$(VENV)/.cutlass: third_party/find_cutlass.py $(VENV)/.tools
	$(BIN)/python third_party/find_cutlass.py || \
	  $(BIN)/pip install -q --no-deps "$$($(BIN)/python third_party/find_cutlass.py --requirement)"
	@touch $@

setup: $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built test-cpp
	$(BIN)/python -m pytest

# The C++ tests need CMake; the kernels they test are covered through Python as well.
test-cpp: $(VENV)/.built
	@if command -v cmake >/dev/null; then \
	  cmake -S . -B build -DBSFA_PYTHON=$(abspath $(BIN)/python) >/dev/null && \
	  cmake --build build -j2 --target cpp_tests && ctest --test-dir build --output-on-failure; \
	else echo "cmake not found: C++ tests skipped"; fi

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

# Compiles the CUDA library for sm_90a; needs nvcc, but no GPU and no CUDA build of torch.
cuda: $(VENV)/.built
	cmake -S . -B build -DBSFA_PYTHON=$(abspath $(BIN)/python)
	cmake --build build -j2 --target bsfa_cuda

bench-cpu: $(VENV)/.built
	$(BIN)/python benchmarks/cpu_attention.py

# Runs on the GPU machine with the Python that holds its torch (no virtual environment); see benchmarks/README.md.
GPU_REPORT ?= benchmarks/results/h200.json
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --output $(GPU_REPORT)

clean:
	rm -rf build dist .stamps python/bsfa/*.so python/bsfa/lib *.egg-info python/*.egg-info
