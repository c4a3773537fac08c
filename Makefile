# Every target makes what it needs: a virtual environment in .venv, then the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMPS := $(VENV)/.stamps
SOURCES := pyproject.toml constraints.txt tests/peers.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-exhaustive lint docs bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(STAMPS)/base: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing puna into $(VENV) (about a minute)"
	@$(PIP) -e .
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test: $(STAMPS)/base
	@echo "installing the test tools"
	@$(PIP) -e '.[test]'
	@$(PIP) --no-deps --no-build-isolation -r tests/peers.txt
	@touch $@

$(STAMPS)/docs: $(STAMPS)/base
	@echo "installing the documentation tools"
	@$(PIP) -e '.[docs]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/test
	@echo "installing the benchmarks' peers"
	@$(PIP) -e '.[bench]'
	@touch $@

demo: $(STAMPS)/base  ## the main job: raw documents -> a Llama that answers, with its report
	@$(BIN)/puna run recipes/demo.toml

test: $(STAMPS)/test  ## the tests (without those marked slow)
	@$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(STAMPS)/test  ## the slow tests: kills spread over the whole main job
	@$(BIN)/python -m pytest -m "slow and not exhaustive"

test-exhaustive: $(STAMPS)/test  ## every layout and fault that the slow tests take a sample of (half an hour)
	@$(BIN)/python -m pytest -m exhaustive

lint: $(STAMPS)/test  ## style, types, import contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check
	@$(BIN)/lint-imports

docs: $(STAMPS)/docs  ## build the documentation into site/
	@$(BIN)/mkdocs build --strict --quiet

bench: $(STAMPS)/bench  ## one table per stage, each beside a peer in the same run
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:  ## remove the virtual environment, runs and caches
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
