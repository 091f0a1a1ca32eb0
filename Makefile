# make demo   set up, fetch the embedded base, train on the embedded data, answer before and after
# make test   set up, then the whole test suite
# make check  lint, types, tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# a core each: threads would wait for each other
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-gpu bench check clean

demo: $(VENV)/.runtime
	$(BIN)/medlora train recipes/demo.yaml

test: $(VENV)/.dev
	$(TESTS) $(ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python bench/cpu_training.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS) $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medlora needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
