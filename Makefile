# Each target sets up what it needs in .venv; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
# Where torch is installed but no package index can be reached:
# make gpu-check VENV_FLAGS=--system-site-packages PIP_FLAGS=--no-deps
VENV_FLAGS ?=
PIP_FLAGS ?=
BIN := $(VENV)/bin
DEMO ?= runs/demo
DEMO_FLAGS ?=
BENCH_FLAGS ?=
# The CUDA kernels take minutes to compile and need nvcc: gpu-check builds them, the rest does not.
export IIRSNN_BUILD_CUDA ?= 0

SOURCES := setup.py iirsnn/_build.py $(shell find csrc -type f)

.PHONY: help demo test sanitize bench bench-check lint format gpu-check clean

help:
	@echo "make demo       train on scikit-learn's digits, from the ANN to one timestep"
	@echo "make test       run the tests"
	@echo "make bench      run the benchmarks (leave the machine alone meanwhile): table and plots in benchmarks/results/"
	@echo "make bench-check  a short run: does iirsnn still hold the committed ratios?"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make gpu-check  build the CUDA kernels, test and time every GPU kernel on this machine's GPU"

$(VENV)/.torch:
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "make: no venv: on Debian and Ubuntu, apt-get install python3-venv python3-dev"; exit 1; }
	@$(BIN)/python -c "import torch, setuptools" 2>/dev/null || \
	    $(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel ninja pybind11 torch torchvision
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test,lint]'
	@touch $@

demo: $(VENV)/.installed
	@if [ -f $(DEMO)/recipe.yaml ]; then rm -rf $(DEMO); fi
	$(BIN)/iirsnn train digits --out $(DEMO) $(DEMO_FLAGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The engine alone: neither torch nor Python, so that nothing else is reported.
ENGINE := $(filter-out %/bind.cpp,$(wildcard csrc/event/*.cpp)) $(wildcard csrc/simd/*.cpp)
sanitize:
	@mkdir -p build
	for kinds in thread address,undefined; do \
	    $(CXX) -std=c++17 -O1 -g -ffp-contract=off -Wno-psabi -pthread -Icsrc -fsanitize=$$kinds \
	        -fno-sanitize-recover=all $(ENGINE) tests/native/shared_engine.cpp -o build/shared_engine && \
	    build/shared_engine || exit 1; \
	done

# The libraries compared with; one that cannot be installed is reported as missing.
$(VENV)/.bench: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench]' || \
	    echo "make: not every library of the extra [bench] could be installed; the results say which are missing"
	@touch $@

# BENCH_FLAGS="--resume" goes on with a run that was cut short; "-k lif" runs a part.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_FLAGS)
	$(BIN)/python benchmarks/record.py report

# A loss has to show twice: on a shared machine a busy minute looks like one.
QUICK := $(BIN)/python -m pytest benchmarks --benchmark-only --quick --results build/bench-check
bench-check: $(VENV)/.bench
	@rm -f build/bench-check*.json
	$(QUICK).json
	$(BIN)/python benchmarks/record.py check build/bench-check.json || \
	    { $(QUICK)-again.json && $(BIN)/python benchmarks/record.py check build/bench-check*.json; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' tests/native)

gpu-check: $(VENV)/.torch
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: no CUDA device found on this machine, nothing was checked')"
	IIRSNN_BUILD_CUDA=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation $(PIP_FLAGS) --editable '.[test]'
	$(BIN)/python benchmarks/gpu_check.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' tests/native)

clean:
	rm -rf $(VENV) build *.egg-info iirsnn/*.so
