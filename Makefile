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

SOURCES := setup.py iirsnn/ops/build.py $(shell find csrc -type f)

.PHONY: help demo test sanitize bench bench-check lint format gpu-check clean

help:
	@echo "make demo       train on scikit-learn's digits, from the ANN to one timestep"
	@echo "make test       run the tests"
	@echo "make bench      run every benchmark (leave the machine alone meanwhile): table and plots in benchmarks/results/"
	@echo "make bench-check  the telling rows: does iirsnn still hold the committed ratios?"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make gpu-check  build the CUDA kernels, test and time every GPU kernel on this machine's GPU"

$(VENV)/.torch:
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "make: no venv: on Debian and Ubuntu, apt-get install python3-venv python3-dev"; exit 1; }
	@$(BIN)/python -c "import torch, setuptools" 2>/dev/null || \
	    $(BIN)/pip install --quiet --disable-pip-version-check setuptools wheel ninja pybind11 torch torchvision
	@touch $@

PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation

# A demo needs no linters and no test tools.
$(VENV)/.train: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP_INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP_INSTALL) --editable '.[train,test,lint]'
	@touch $@ $(VENV)/.train

demo: $(VENV)/.train
	@if [ -f $(DEMO)/recipe.yaml ]; then rm -rf $(DEMO); fi
	$(BIN)/iirsnn train digits --out $(DEMO) $(DEMO_FLAGS)

test: $(VENV)/.neurons
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The engine alone: neither torch nor Python, so that nothing else is reported.
ENGINE := $(filter-out %/bind.cpp,$(wildcard csrc/event/*.cpp)) $(wildcard csrc/simd/*.cpp)
sanitize:
	@mkdir -p build
	for kinds in thread address,undefined; do \
	    $(CXX) -std=c++17 -O1 -g -ffp-contract=off -Wno-psabi -pthread -Icsrc -fsanitize=$$kinds \
	        -fno-sanitize-recover=all $(ENGINE) tests/native/sanitized/shared_engine.cpp -o build/shared_engine && \
	    build/shared_engine || exit 1; \
	done

# Other libraries, each by itself and with build isolation: one that fails costs no other. None may change the torch that
# the kernels are compiled against.
define install_each
@$(BIN)/pip list --format=freeze --disable-pip-version-check | grep -E '^(torch|torchvision|numpy)==' > $@.constraint
@for peer in $(1); do \
    $(BIN)/pip install --quiet --disable-pip-version-check --constraint $@.constraint "$$peer" > $@.log 2>&1 || \
        { echo "make: $$peer could not be installed, $(2):"; tail -n 1 $@.log; }; \
done
@rm -f $@.log $@.constraint
@touch $@
endef

$(VENV)/.neurons: $(VENV)/.installed
	$(call install_each,'spikingjelly>=2.0' 'snntorch>=1.0' 'norse>=1.1' 'sinabs>=3.1',its tests are skipped)

$(VENV)/.bench: $(VENV)/.neurons
	$(call install_each,onnx onnxruntime openvino,the results will call it missing)

# Every row, into benchmarks/results/<machine>-<capability>.json. A second call goes on where the first one was cut short:
# rows of this commit are left out. BENCH_FLAGS="-k lif" runs a part; IIRSNN_CPU_CAPABILITY=avx2 another instruction set.
bench: $(VENV)/.bench
	results=$$($(BIN)/python benchmarks/record.py name) && \
	    $(BIN)/python -m pytest benchmarks --benchmark-only --full --resume --results $$results $(BENCH_FLAGS) && \
	    $(BIN)/python benchmarks/record.py report $$results

# A loss has to show twice: on a shared machine a busy minute looks like one.
QUICK := $(BIN)/python -m pytest benchmarks --benchmark-only --results build/bench-check
bench-check: $(VENV)/.bench
	@rm -f build/bench-check*.json
	$(QUICK).json
	$(BIN)/python benchmarks/record.py check build/bench-check.json || \
	    { $(QUICK)-again.json && $(BIN)/python benchmarks/record.py check build/bench-check*.json; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/native/*.h' 'tests/native/*.cpp')

gpu-check: $(VENV)/.torch
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: no CUDA device found on this machine, nothing was checked')"
	IIRSNN_BUILD_CUDA=1 $(PIP_INSTALL) $(PIP_FLAGS) --editable '.[test]'
	$(BIN)/python benchmarks/gpu_check.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/native/*.h' 'tests/native/*.cpp')

clean:
	rm -rf $(VENV) build *.egg-info iirsnn/*.so
