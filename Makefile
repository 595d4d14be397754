# Everything that a person or CI does here. It needs Python 3.11 or 3.12, pip and make; the rest is installed once into
# .venv, and again when the lock changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .cache/peers-venv/.installed
KSERVE := .cache/kserve-venv/.installed
RIG ?= ../shared/directml-rig
# Processes that run the tests at once, each with servers of its own. Most tests wait most of the time.
WORKERS ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo demo-training demo-image up check test test-unit test-plain-http lint format wheels bench streams soak test-directml lock peers kserve

help:
	@echo "make demo           install, start everything, run a real model, stop everything"
	@echo "make demo-training  the same for training"
	@echo "make demo-image     from a prompt to a PNG, by a tiny pipeline with random weights; SDXL=/path takes a real one"
	@echo "make up             start everything and stay; Ctrl-C stops it"
	@echo "make check          the gate, as in CI: make lint and make test"
	@echo "make lint, make test   linters, types, import rules; all tests; WORKERS=1 where memory is short"
	@echo "make test-unit      the tests that need no server"
	@echo "make wheels         both distributions, into dist/"
	@echo "make test-plain-http  the tests over HTTP with HTTP__FAST_PATH=false"
	@echo "make bench          each figure beside its yardstick"
	@echo "make streams        4 GiB in and out, with the memory that each process takes"
	@echo "make soak           an hour of mixed work, with faults; then the random tests at length"
	@echo "make test-directml RIG=folder   the DirectML tests, with Windows' own wheels"
	@echo "make format, make lock   reformat; write the lock files anew"

install: $(INSTALLED)

$(INSTALLED): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
		"$(PYTHON) is Python %d.%d, and 3.11 or 3.12 is needed: make PYTHON=python3.11 …" % sys.version_info[:2])'
	@echo "installing into $(VENV) (once; a minute or two)"
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(BIN)/python -m pip install --quiet --requirement requirements/dev.lock
	@$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m examples.demo

demo-training: $(INSTALLED)
	@$(BIN)/python -m examples.training

demo-image: $(INSTALLED)
	@$(BIN)/python -m examples.image

up: $(INSTALLED)
	@$(BIN)/device-operations up

check: lint test

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit

test: $(INSTALLED) $(KSERVE)
	$(BIN)/python -m pytest -m "not serial" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m serial

# What is served without reaching into uvicorn's insides answers the same.
test-plain-http: $(INSTALLED) $(KSERVE)
	DEVICE_OPERATIONS_HTTP__FAST_PATH=false $(BIN)/python -m pytest tests/acceptance tests/inference tests/owners tests/openai

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What an earlier build left would get into the wheels, so it goes first.
wheels: $(INSTALLED)
	@rm -rf build dist server/build
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . ./server
	@ls dist

bench: $(INSTALLED) $(PEERS)
	@$(BIN)/python -m benchmarks

$(PEERS): requirements/peers.lock
	@echo "installing the model servers to compare with into .cache/peers-venv (once; a minute or two)"
	@$(PYTHON) -m venv .cache/peers-venv 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip .cache/peers-venv \
		&& $(PYTHON) -m pip --python .cache/peers-venv/bin/python install --quiet pip; }
	@.cache/peers-venv/bin/python -m pip install --quiet --requirement requirements/peers.lock
	@touch $@

peers: $(PEERS)

$(KSERVE): requirements/kserve.lock
	@echo "installing KServe's client, which tests speak with, into .cache/kserve-venv (once; half a minute)"
	@$(PYTHON) -m venv .cache/kserve-venv 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip .cache/kserve-venv \
		&& $(PYTHON) -m pip --python .cache/kserve-venv/bin/python install --quiet pip; }
	@.cache/kserve-venv/bin/python -m pip install --quiet --requirement requirements/kserve.lock
	@touch $@

kserve: $(KSERVE)

# What the tests show with one gibibyte, with four; about a minute and a half.
streams: $(INSTALLED)
	BLOBS_GIB=4 $(BIN)/python -m pytest tests/blobs/test_routes.py -k gibibyte

soak: $(INSTALLED)
	@$(BIN)/python -m benchmarks.soak
	TEST_REPETITIONS=10 $(BIN)/python -m pytest tests/faults/test_mutated_messages.py \
		tests/fuzzing tests/memory/test_state_machine.py tests/rows/test_random_graphs.py tests/training_service/test_death.py

test-directml: $(INSTALLED)
	@test -f tests/directml/run.sh || { echo "tests/directml/run.sh is not there: nothing can be run in the rig"; exit 1; }
	sh tests/directml/run.sh $(RIG)

lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	PATH=$(BIN):$$PATH requirements/compile.sh
