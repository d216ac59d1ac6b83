# Everything runs in .venv, which these targets set up themselves.
#   make train      train a small GPT with fusedopt and with torch.optim
#   make test       all tests, then those of the CUDA driver with its kernels emulated on the CPU
#   make bench      the step benchmark (BENCH="--optimizer SGD --shapes resnet50" to choose);
#                   bench/README.md says what answers which question
#   make lint       ruff, mypy, clang-format, the form of the workflows
#   make sanitize   tests under the address and undefined-behaviour sanitizers
#   make cuda       a wheel with CUDA under a CUDA build of torch (in .venv-cuda): the tests of what
#                   these could break, and a look at the kernels' machine code; needs no GPU
#   make stacks     tests with other packages that train: transformers, Lightning, DeepSpeed ... (in
#                   .venv-stacks)
#   make docs       the documentation site in build/site, warnings as errors (in .venv-docs; needs no
#                   compiler and no torch)
#   make wheels     wheels for each CPython there is, with CUDA, and a source distribution, in dist/
#                   (PYTHONS="python3.12 /a/b/python" to choose; in .venv-wheels)
#   make check-wheels   each of these wheels, tried in a fresh environment with torch
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
# The versions to build wheels for, where PATH or pyenv has an interpreter with its headers.
CPYTHONS := 3.10 3.11 3.12 3.13 3.14
python = $(firstword $(foreach candidate,python$(1) $(wildcard ~/.pyenv/versions/$(1).*/bin/python$(1)), \
    $(shell $(candidate) -c "import os, sys, sysconfig; print(sys.executable if \
        os.path.exists(sysconfig.get_path('include') + '/Python.h') else '')" 2>/dev/null)))
PYTHONS ?= $(foreach version,$(CPYTHONS),$(call python,$(version)))
DIST ?= dist
BENCH ?= --shapes all
TRAIN ?=
PYTEST ?=
GPU ?=
GPU_OUT ?= build/gpu

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
# Tests run in a process per core, whose threads must not take the cores from each other: they do
# not spin while they wait. Tests still have as many threads as they ask for.
WORKERS = -n auto --maxprocesses 8 --dist worksteal
TESTS = OMP_WAIT_POLICY=passive $(BIN)/pytest $(WORKERS)

# The requirements that file $(1) gives the name $(2).
pinned = $$($(PYTHON) -c "import re; text = open('$(1)').read(); \
    print(*re.findall(r'[\w-]+==[\d.*]+', re.search(r'^$(2) = \[(.*?)\]', text, re.M | re.S)[1]))")
# Where a CUDA toolkit from PyPI goes, one for all builds, if the machine has no nvcc on PATH.
NVCC := $(if $(CUDA_HOME)$(shell command -v nvcc),,.venv-wheels/nvcc)

.PHONY: train test bench gpu lint format sanitize cuda stacks docs wheels check-wheels compdb clean

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
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml

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

# A wheel as `make wheels` makes it, and not the sources. What the CPU driver computes is tested by make test.
CUDA_TESTS = $(patsubst %,tests/%,cuda torch_api) \
    $(patsubst %,tests/numerics/test_%.py,hypothesis layouts worked_examples) \
    $(patsubst %,tests/project/test_%.py,build install layers docs figures) \
    $(patsubst %,tests/refusals/test_%.py,errors interrupted options params) \
    tests/checkpoints/test_state_dict.py tests/scaling/test_torch_scaler.py

cuda: .venv-cuda/torch
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -q "$(TORCH_CUDA)"
	$(MAKE) wheels FUSEDOPT_CUDA=1 PYTHONS=.venv-cuda/bin/python DIST=build/cuda
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -q --force-reinstall --no-deps \
	    build/cuda/*.whl
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -q \
	    "$$(ls build/cuda/*.whl)[test,bench]" pybind11
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
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q $(call pinned,pyproject.toml,docs)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# Wheels to publish. All Pythons share build/wheels/temp, where ninja sees by their commands that only
# the bindings must be compiled again. libgomp stays torch's, whose threads the CPU driver shares.
wheels: .venv-wheels/tools $(NVCC)
	rm -rf build/wheels/lib* build/wheels/raw $(DIST)/fusedopt-*
	set -e; for python in $(PYTHONS); do echo "a wheel for $$python"; \
	    $(CUDA_BUILD) $(WHEEL_PIP) --python $$(command -v $$python) wheel -q --no-deps -w build/wheels/raw . \
	        --config-settings=--build-option="build --build-base=build/wheels --build-temp=build/wheels/temp"; \
	done
	PATH="$(CURDIR)/.venv-wheels/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 -w $(DIST) build/wheels/raw/*.whl
	FUSEDOPT_CUDA=0 .venv-wheels/bin/python -m build --sdist -o $(DIST) >/dev/null
	.venv-wheels/bin/twine check --strict $(DIST)/fusedopt-*
	@ls -l $(DIST)
	@$(if $(filter file,$(origin PYTHONS)),$(foreach version,$(CPYTHONS),$(if $(call python,$(version)),, \
	    echo "no Python $(version), so no wheel for it";)))

# Each in an environment where nothing was before.
check-wheels: .venv-wheels/tools
	set -e; for python in $(PYTHONS); do \
	    tag=cp$$($$python -c "import sys; print(*sys.version_info[:2], sep='')"); \
	    env=build/wheels/$$tag; rm -rf $$env; $$python -m venv --without-pip $$env; \
	    $(WHEEL_PIP) --python $$env/bin/python install -q "$(TORCH)" $(DIST)/fusedopt-*-$$tag-*.whl \
	        pytest hypothesis numpy; \
	    $$env/bin/python -I -c "import fusedopt; fusedopt.show_config()"; \
	    PYTHONSAFEPATH=1 $$env/bin/pytest -q $(WHEEL_TESTS) $(PYTEST); rm -rf $$env; \
	done

WHEEL_TESTS = tests/project/test_install.py tests/torch_api/test_dropin.py
WHEEL_PIP = .venv-wheels/bin/pip --disable-pip-version-check

# With CUDA (or FUSEDOPT_CUDA=0) for all architectures, whatever GPU this machine has.
CUDA_BUILD = FUSEDOPT_CUDA=$(or $(FUSEDOPT_CUDA),1) FUSEDOPT_STRICT=1 \
    FUSEDOPT_CUDA_ARCHS="$(or $(FUSEDOPT_CUDA_ARCHS),all)" $(NVCC:%=CUDA_HOME=$(CURDIR)/%/nvidia/cu13)

.venv-wheels/tools: pyproject.toml
	test -x .venv-wheels/bin/python || $(PYTHON) -m venv .venv-wheels
	$(WHEEL_PIP) install -q -U pip $(call pinned,pyproject.toml,wheels)
	touch $@

.venv-wheels/nvcc: setup.py .venv-wheels/tools
	$(WHEEL_PIP) install -q -U --no-deps --target $@ $(call pinned,setup.py,CUDA_WHEELS)
	touch $@

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

build/emulated/built: $(VENV)/torch $(SOURCES) $(shell find fusedopt -name '*.py')
	FUSEDOPT_CUDA=emulated $(BIN)/python setup.py -q build \
	    --build-base build/emulated --build-lib build/emulated/lib
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(PIP) $(call pinned,pyproject.toml,lint)
	touch $@

clean:
	rm -rf $(VENV) .venv-cuda .venv-stacks .venv-docs .venv-wheels build dist compile_commands.json fusedopt/*.so *.egg-info
