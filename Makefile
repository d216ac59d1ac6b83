# Everything runs in .venv, which these targets set up themselves.
#   make train      train a small GPT with fusedopt and with its torch.optim twin
#   make test       all tests
#   make bench      the step benchmark (BENCH="--optimizer SGD --shapes resnet50" to choose)
#   make lint       ruff, mypy, clang-format
#   make sanitize   the Python tests against a build with address and undefined-behaviour sanitizers
#   make wheel      a wheel in dist/
#   make gpu        all that needs a GPU, in under ten minutes, into GPU_OUT (GPU="--parts build step")
# make gpu alone uses no .venv: it installs into the Python it finds (PYTHON), which must have torch
# with CUDA, pytest, hypothesis, pybind11 and ninja, and needs no network.
# TORCH=torch takes the newest torch instead of the version the project is developed with.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BENCH ?= --shapes all
TRAIN ?=
PYTEST ?=
GPU ?=
GPU_OUT ?= build/gpu

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp')
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: train test bench gpu lint format sanitize wheel clean

train: $(VENV)/built
	$(BIN)/python bench/train_gpt.py $(TRAIN)

test: $(VENV)/built
	$(BIN)/python -m pytest $(PYTEST)

bench: $(VENV)/built
	$(BIN)/python bench/step.py $(BENCH)

gpu:
	$(PYTHON) bench/gpu.py --out $(GPU_OUT) $(GPU)

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
sanitize: $(VENV)/built
	FUSEDOPT_SANITIZE=address,undefined $(BIN)/python setup.py -q build \
	    --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    PYTHONPATH=build/sanitize/lib $(BIN)/pytest -m "not unsanitized" $(PYTEST)

wheel: $(VENV)/built
	$(PIP) build
	$(BIN)/python -m build --wheel

$(VENV)/torch: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) setuptools pybind11 ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PIP) -e ".[test,bench]"
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(PIP) $$($(BIN)/python -c "import re; \
	    print(*re.findall(r'[\w-]+==[\d.]+', re.search(r'lint = (.*)', open('pyproject.toml').read())[1]))")
	touch $@

clean:
	rm -rf $(VENV) build dist fusedopt/*.so *.egg-info
