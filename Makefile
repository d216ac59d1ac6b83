# Everything runs in .venv, which these targets set up themselves.
#   make train      train a small GPT with fusedopt and with torch.optim
#   make test       all tests, then those of the CUDA driver with its kernels emulated on the CPU
#   make bench      the step benchmark (BENCH="--optimizer SGD --shapes resnet50" to choose);
#                   bench/README.md says what answers which question
#   make lint       ruff, mypy, clang-format
#   make sanitize   tests under the address and undefined-behaviour sanitizers
#   make cuda       a build for CUDA under a CUDA build of torch (in .venv-cuda): the tests of what
#                   these could break, and a look at the kernels' machine code; needs no GPU
#   make stacks     tests with other packages that train: transformers, Lightning, DeepSpeed ... (in
#                   .venv-stacks)
#   make docs       the documentation site in build/site, warnings as errors (in .venv-docs; needs no
#                   compiler and no torch)
#   make wheel      a wheel in dist/
#   make compdb     compile_commands.json for clangd and the like
#   make gpu        all that needs a GPU, within twelve minutes, into GPU_OUT (GPU="--parts build step",
#                   each part alone within four; GPU="--wheel FILE" installs that and builds nothing)
# make gpu alone uses no .venv: it installs into the Python it finds (PYTHON), which must have torch
# with CUDA, pytest, hypothesis, matplotlib, pybind11, ninja and setuptools >= 77 (without --wheel),
# and needs no network. All tests in its time need pytest-xdist, too.
# TORCH=torch takes the newest torch instead of the version the project is developed with.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch
VENV := .venv
BIN := $(VENV)/bin
BENCH ?= --shapes all
TRAIN ?=
PYTEST ?=
GPU ?=
GPU_OUT ?= build/gpu

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
# What an extra of pyproject.toml pins, without the project itself.
pinned = $$($(PYTHON) -c "import re; \
    print(*re.findall(r'[\w-]+==[\d.]+', re.search(r'^$(1) = \[(.*?)\]', open('pyproject.toml').read(), \
    re.M | re.S)[1]))")

# Tests run in a process per core, whose threads must not take the cores from each other: they do
# not spin while they wait. Tests still have as many threads as they ask for.
WORKERS = -n auto --maxprocesses 8 --dist worksteal
TESTS = OMP_WAIT_POLICY=passive $(BIN)/pytest $(WORKERS)

.PHONY: train test bench gpu lint format sanitize cuda stacks docs wheel compdb clean

train: $(VENV)/built
	$(BIN)/python examples/train_gpt.py $(TRAIN)

test: $(VENV)/built build/emulated/built
	$(TESTS) -m "not builds_sanitized and not stacks_only" $(PYTEST)
	FUSEDOPT_FINGERPRINTS=0 $(TESTS) tests/torch_api tests/scaling/test_torch_scaler.py \
	    $(PYTEST)
	PYTHONPATH=build/emulated/lib $(TESTS) --device emulated $(PYTEST)

bench: $(VENV)/built
	$(BIN)/python bench/step.py $(BENCH)

gpu:
	$(PYTHON) bench/gpu/run_all.py --out $(GPU_OUT) $(GPU)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The sanitizers' runtime comes first into the process. Leaks are not looked for: Python and torch
# keep memory until the process ends.
SANITIZED = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    PYTHONPATH=build/sanitize/lib $(TESTS) -m "not unsanitized"

sanitize: $(VENV)/built
	FUSEDOPT_SANITIZE=address,undefined FUSEDOPT_CUDA=emulated $(BIN)/python setup.py -q build \
	    --build-base build/sanitize --build-lib build/sanitize/lib
	$(TESTS) -m builds_sanitized tests/cpp
	$(SANITIZED) $(PYTEST)
	$(SANITIZED) --device emulated tests/cuda tests/options/test_clip_history.py \
	    tests/options/test_masters.py $(PYTEST)

# An installed wheel, and not the sources. What the CPU driver computes is tested by make test.
CUDA_TESTS = $(patsubst %,tests/%,cuda torch_api) \
    $(patsubst %,tests/numerics/test_%.py,hypothesis layouts worked_examples) \
    $(patsubst %,tests/project/test_%.py,build install layers docs figures) \
    $(patsubst %,tests/refusals/test_%.py,errors interrupted options params) \
    tests/checkpoints/test_state_dict.py tests/scaling/test_torch_scaler.py

cuda: .venv-cuda/torch
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -q "$(TORCH_CUDA)"
	FUSEDOPT_CUDA=1 FUSEDOPT_STRICT=1 .venv-cuda/bin/python -m pip --disable-pip-version-check \
	    install -q ".[test,bench]" pybind11
	OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1 .venv-cuda/bin/pytest $(WORKERS) $(CUDA_TESTS) $(PYTEST)
	.venv-cuda/bin/python tests/support/sass.py

.venv-cuda/torch:
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -q "$(TORCH_CUDA)"
	touch $@

# An installed wheel, beside packages that are pinned, as their next release may need other tests.
stacks:
	test -x .venv-stacks/bin/python || $(PYTHON) -m venv .venv-stacks
	.venv-stacks/bin/python -m pip --disable-pip-version-check install -q "$(TORCH)"
	FUSEDOPT_CUDA=0 .venv-stacks/bin/python -m pip --disable-pip-version-check install -q \
	    "$(TORCH)" ".[test,stacks]"
	OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1 .venv-stacks/bin/pytest $(WORKERS) tests/stacks $(PYTEST)

docs:
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q $(call pinned,docs)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

wheel: $(VENV)/built
	$(PIP) build
	$(BIN)/python -m build --wheel

# From the emulated build, which compiles the most of csrc/ as C++. The bindings are compiled as one
# source that includes the others; here each has an entry.
compdb: build/emulated/built
	$(BIN)/python -m ninja -f $$(ls -t build/emulated/temp*/build.ninja | head -1) -t compdb compile \
	    | $(BIN)/python -c "import glob, json, sys; \
	    print(json.dumps([{**unit, 'file': file, 'command': unit['command'].replace(unit['file'], file)} \
	        for unit in json.load(sys.stdin) \
	        for file in (sorted(glob.glob('csrc/bindings/*.cpp')) \
	            if unit['file'].endswith('/bindings.cpp') else [unit['file']])], indent=1))" \
	    >compile_commands.json

$(VENV)/torch: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) setuptools pybind11 ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PIP) -e ".[test,bench]"
	touch $@

build/emulated/built: $(VENV)/torch $(SOURCES) $(wildcard fusedopt/*.py)
	FUSEDOPT_CUDA=emulated $(BIN)/python setup.py -q build \
	    --build-base build/emulated --build-lib build/emulated/lib
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(PIP) $(call pinned,lint)
	touch $@

clean:
	rm -rf $(VENV) .venv-cuda .venv-stacks .venv-docs build dist compile_commands.json fusedopt/*.so *.egg-info
