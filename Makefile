# `make train` and `make test` need Python 3.10-3.13 and a package index; everything else they bring themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test test-all lint types format clean help

help:
	@echo "make train      corpus, tokenizer, training, sample: the main job (ARGS='--steps 200' for flags)"
	@echo "make test       the tests, some minutes"
	@echo "make test-all   the long tests too"
	@echo "make lint types format clean"

train: $(VENV)/installed
	$(BIN)/python -m functional_lm.train $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not long" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-all: $(VENV)/installed-long
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# What the long tests ask besides. llama.cpp is compiled, which takes some 8 minutes; where it cannot be, the tests that
# ask it are skipped.
$(VENV)/installed-long: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,harness]"
	-CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
