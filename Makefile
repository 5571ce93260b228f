# make demo | test | test-gpu | fuzz | lint | docs | bench | setup. Every one sets the environment up first, if that isn't done yet.

VENV := .venv
READY := $(VENV)/.ready
MODEL := demo-model
BIN := $(VENV)/bin

# Imports take seconds longer, in every process, where bytecode isn't kept.
unexport PYTHONDONTWRITEBYTECODE

# The first interpreter that is new enough and can make environments. `make PYTHON=...` overrules.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu fuzz lint docs bench

help:
	@echo "make demo    operate on a small Qwen3-Omni model with vLLM on CPU, prove it, report it"
	@echo "make test    run the tests; ARGS='-k name' chooses, ARGS='-m \"not slow\"' leaves the slow ones out"
	@echo "make test-gpu  run what needs a GPU, with GPU_PYTHON: an interpreter that has torch for CUDA, vLLM and pytest"
	@echo "make fuzz    run the tests of generated examples with new examples, until one fails"
	@echo "make lint    ruff, mypy and the contracts on imports"
	@echo "make docs    build the documentation's site in site/ and check its links"
	@echo "make bench   time the old and the new block"
	@echo "make setup   only make $(VENV), from the pinned lists in requirements/"

setup: $(READY)

$(READY): requirements/torch-cpu.txt requirements/cpu.txt requirements/dev.txt requirements/apart/triton.txt pyproject.toml setup/install.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is needed; name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) setup/install.py $(VENV)
	@touch $@

# config.json is written last, so a model that was left unfinished is made again.
$(MODEL)/config.json: examples/make_qwen3_omni.py examples/qwen3_omni_config.py | $(READY)
	@rm -rf $(MODEL)
	@$(BIN)/python examples/make_qwen3_omni.py $(MODEL)

demo: $(READY) $(MODEL)/config.json
	@$(BIN)/moe-surgery apply $(MODEL) --generate "1,2,3"

test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The set-up is for CPUs, so this takes what is on the machine.
test-gpu:
	@$(GPU_PYTHON) -m pytest tests/gpu tests/test_folded_kernels.py tests/test_e4m3_kernels.py $(ARGS)

fuzz: $(READY)
	@while $(BIN)/python -m pytest -q -x -n 2 --hypothesis-profile=fuzz -m hypothesis $(ARGS); do :; done; false

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

$(VENV)/docs/.ready: requirements/apart/docs.txt | $(READY)
	@$(BIN)/python -m venv --clear $(VENV)/docs
	@$(VENV)/docs/bin/python -m pip install -qq --no-deps --disable-pip-version-check -r $<
	@touch $@

docs: $(VENV)/docs/.ready
	@NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python docs/build_site.py

bench: $(READY)
	@$(BIN)/python benchmarks/cpu_block.py $(ARGS)
