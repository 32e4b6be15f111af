# Everything runs in $(VENV), which these targets make and keep up to date. ARGS goes to the command at the end.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Tests wait for processes and sockets a third of their time: one worker more than there are cores.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CHAOS := tests/e2e/chaos tests/server/adapters/loading/test_mutants.py tests/adapters_store/test_registry_stateful.py
# Not compiled: a run imports a third of the 15,000 files, which Python compiles then.
INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable

.PHONY: help install serve kernels test test-chaos test-avx2 lint format clients bench constraints clean

help:
	@echo "make serve   install, fetch the default model, serve on http://127.0.0.1:8000"
	@echo "make test    install with the test tools, run all tests"
	@echo "make test-chaos   many more kills, damaged adapters and histories than make test has"
	@echo "make test-avx2   what may depend on the processor's instructions, with those beyond AVX2 hidden"
	@echo "make constraints   write the installed versions into constraints.txt"
	@echo "make lint    ruff and mypy --strict        make format   let ruff rewrite"
	@echo "make clients   run OpenAI's clients and others against a server, write docs/compatibility.md"
	@echo "make bench   mixed batches against PEFT    make clean    remove what make made, but no data"

serve: $(VENV)/.serve
	$(BIN)/polypeft serve $(ARGS)

install: $(VENV)/.develop

kernels: $(VENV)/.develop
	$(BIN)/python -m tests.compile_kernels

test: $(VENV)/.develop
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-chaos: $(VENV)/.develop
	CHAOS_KILLS=12 ACKS_KILLS=8 $(BIN)/python -m pytest $(PARALLEL) $(CHAOS) --mutants 2000 --registry-examples 200 $(ARGS)

test-avx2: $(VENV)/.develop
	$(BIN)/python -m tests.avx2 $(PARALLEL) $(ARGS)

lint: $(VENV)/.develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.develop
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Needs the network and minutes: each client is installed in an environment of its own, below .cache/clients.
clients: $(VENV)/.develop
	$(BIN)/python -m tests.clients --write $(ARGS)

bench: $(VENV)/.develop
	$(BIN)/python -m benchmarks.mixed_batch $(ARGS)

# After an upgrade by hand and a run of .ci/run: keep what it ran with. Triton's version is torch's to choose.
constraints:
	@sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --exclude-editable --exclude triton --exclude vllm | sed 's/+cpu$$//' >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.develop: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/.serve

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Polypeft needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
