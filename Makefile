# Everything from a fresh checkout: `make demo` and `make test` create .venv, install torch, the pinned requirements and
# the package with its compiled extension, and then run. Each step leaves a stamp file, so the second run starts at once,
# and a change in csrc/ or setup.py builds again.
#
# Variables
#   PYTHON       the interpreter that .venv is made of, 3.11 or newer (python3)
#   TORCH        which torch (torch==2.13.0)
#   TORCH_INDEX  further pip arguments for torch alone, such as --index-url URL of PyTorch's CPU builds
#   ARGS         further arguments for pytest, the demo or the benchmark
#   OUT          where `make gpu` leaves its results (build/gpu)

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
ARGS ?=
OUT ?= build/gpu

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/stamps
SOURCES := pyproject.toml $(wildcard setup.py MANIFEST.in) $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.hpp' -o -name '*.inc')

# The C++ self-test: the kernels without Python, for machines and instruction sets that the tests do not reach.
SELFTEST := build/selftest
KERNEL_SOURCES := csrc/tests/selftest.cpp $(wildcard csrc/cpu/*.cpp)
KERNEL_FLAGS := -O3 -std=c++17 -ffp-contract=off -fopenmp -Wall -Wextra -Werror -Icsrc
AVX2_FLAGS := -mavx2 -mfma -mf16c
AVX512_FLAGS := $(AVX2_FLAGS) -mavx512f -mavx512dq -mavx512bw -mavx512vl

.PHONY: help install demo test test-full lint bench bench-plot gpu selftest selftest-arm64 clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: install  ## train a character model with torch.nn and fastseq, then cluster digits (3 minutes; writes demo.png)
	$(PY) -m fastseq demo $(ARGS)

# A process for each core, with one thread each: two of two threads would wait for one another. Tests of several threads
# ask for them. ARGS="-n 0" runs all in one process.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

test: install  ## the quick tier of tests
	$(PYTEST) $(ARGS)

test-full: install  ## every combination
	$(PYTEST) --full $(ARGS)

lint: install  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

bench: $(STAMPS)/bench  ## time all libraries (12 minutes), store benchmarks/results/cpu.json, write the README's tables
	$(PY) -m fastseq bench --avx2 --scaling --json benchmarks/results/cpu.json $(ARGS)
	$(PY) -m benchmarks.table

bench-plot: $(STAMPS)/bench  ## pictures of the stored figures: speed.png and speed-scaling.png
	$(PY) -m fastseq bench --results benchmarks/results/cpu.json --plot speed.png $(ARGS)

# With the python that has torch and CUDA, not with .venv: the build is editable, and nothing is fetched.
gpu:  ## on a machine with a GPU: build, test and measure the kernels for GPUs (9 minutes; PYTHON=, OUT=folder)
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(ARGS)

selftest:  ## the C++ kernels against plain loops, without Python (x86-64)
	@mkdir -p $(SELFTEST)
	$(CXX) $(KERNEL_FLAGS) -c csrc/cpu/isa/baseline.cpp -o $(SELFTEST)/baseline.o
	$(CXX) $(KERNEL_FLAGS) $(AVX2_FLAGS) -c csrc/cpu/isa/avx2.cpp -o $(SELFTEST)/avx2.o
	$(CXX) $(KERNEL_FLAGS) $(AVX512_FLAGS) -c csrc/cpu/isa/avx512.cpp -o $(SELFTEST)/avx512.o
	$(CXX) $(KERNEL_FLAGS) $(KERNEL_SOURCES) $(SELFTEST)/*.o -o $(SELFTEST)/selftest
	$(SELFTEST)/selftest $(ARGS)

selftest-arm64:  ## the same for arm64: needs a cross compiler and qemu (Debian: g++-aarch64-linux-gnu qemu-user)
	@mkdir -p $(SELFTEST)-arm64
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -static $(KERNEL_SOURCES) csrc/cpu/isa/neon.cpp -o $(SELFTEST)-arm64/selftest
	qemu-aarch64 $(SELFTEST)-arm64/selftest $(ARGS)

# The compiler and pip work side by side: the extension needs neither torch nor anything else that pip brings.
install: $(STAMPS)/venv  ## .venv with the package in editable mode
	@$(MAKE) --no-print-directory -j2 $(STAMPS)/package $(STAMPS)/requirements

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastseq needs Python 3.11 or newer, and '$(PYTHON)' is not: run make with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot create virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
		echo "'$(PYTHON)' has no header files (Python.h): install its development package (Debian: python3-dev)" >&2; exit 1; }
	@command -v $(CXX) > /dev/null || { \
		echo "no C++ compiler '$(CXX)': install one (Debian: g++), or name another with CXX=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/venv requirements-build.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-build.txt
	@touch $@

$(STAMPS)/torch: $(STAMPS)/build
	$(BIN)/pip install --disable-pip-version-check $(TORCH_INDEX) "$(TORCH)"
	@touch $@

$(STAMPS)/requirements: $(STAMPS)/torch requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(STAMPS)/package: $(STAMPS)/build $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/bench: $(STAMPS)/package $(STAMPS)/requirements requirements-bench.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-bench.txt
	@touch $@

clean:  ## remove builds and caches, and .venv
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastseq -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
