# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own virtual environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_WORKERS ?= 2
JOBS ?= 2
MAKEFLAGS += --no-print-directory

# Tests load the plugin in these TensorRT registries.
TENSORRT_DISPATCH := 10.16 11.4
DISPATCH_STAMP    := $(VENV)/tensorrt/.installed

# CUDA's headers and runtime for the cross build: 2 MB from PyPI.
CUDA_AARCH64 := build/cuda-aarch64
AARCH64_TAGS := $(foreach tag,manylinux2014 manylinux_2_17 manylinux_2_28,--platform $(tag)_aarch64)

# The GPU lane runs where the dev packages cannot be had too, as on a Jetson.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

CXX_SOURCES = $(shell find trt_plugins tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

export PATH := $(abspath $(BIN)):$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))
export STTS_TENSORRT_DISPATCH ?= $(abspath $(VENV)/tensorrt)

.PHONY: demo test lint types native unit tensorrt plugin plugin-aarch64 test-gpu gpu-kit format bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stts-export needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(DISPATCH_STAMP): Makefile $(STAMP)
	rm -rf $(VENV)/tensorrt
	for version in $(TENSORRT_DISPATCH); do \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	        --target $(VENV)/tensorrt/$$version "tensorrt-dispatch-cu13-libs==$$version.*" \
	        "tensorrt-dispatch-cu13-bindings==$$version.*" || exit 1; \
	done
	touch $@

test: lint types native unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

types: $(STAMP)
	$(BIN)/mypy

# The C++ tests, on the CPU.
native: $(STAMP)
	@command -v c++ >/dev/null || { echo 'error: no C++ compiler (c++). Fix: apt install g++' >&2; exit 1; }
	cmake --preset tests
	cmake --build --preset tests --parallel $(JOBS)
	ctest --preset tests

unit: $(STAMP) $(DISPATCH_STAMP)
	$(BIN)/pytest -n $(PYTEST_WORKERS)

tensorrt: $(DISPATCH_STAMP)

# build/release/libstts_plugins.so
plugin: $(STAMP)
	cmake --preset release
	cmake --build --preset release --parallel $(JOBS)

# build/aarch64/libstts_plugins.so, on another machine's processor
plugin-aarch64: $(STAMP)
	rm -rf build/wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	    --only-binary=:all: $(AARCH64_TAGS) --dest build/wheels 'nvidia-cuda-runtime==13.0.*'
	$(BIN)/python -m zipfile -e build/wheels/nvidia_cuda_runtime-13.0.*_aarch64.whl build/wheels/aarch64
	rm -rf $(CUDA_AARCH64)
	mv build/wheels/aarch64/nvidia/cu13 $(CUDA_AARCH64)
	cmake --preset aarch64 -DSTTS_CUDA_TARGET_ROOT=$(abspath $(CUDA_AARCH64))
	cmake --build --preset aarch64 --parallel $(JOBS)

test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu -rs --confcutdir=tests/gpu -W default

# What `make test-gpu` compares with, for a machine that cannot make it: copy build/gpu_kit there.
gpu-kit: $(STAMP)
	$(BIN)/python -m tests.gpu.kit build/gpu_kit

demo: $(STAMP)
	$(BIN)/python examples/demo.py

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_prune.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build demo_out .pytest_cache .mypy_cache .ruff_cache
