# `make` lists the targets.  PYTHON chooses the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
QUICK := -m 'not slow' -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow test-faults fuzz lock lint typecheck check docs coverage format clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## Make .venv with everything the project needs (quick when done)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

run: install ## Train the default model (a minute or two on a laptop)
	$(BIN)/python -m tinygpt.run

test: install ## Run the tests
	$(BIN)/python -m pytest $(QUICK)

test-slow: install ## Run the slow tests: real commands, kill tests, every configuration
	$(BIN)/python -m pytest -m 'slow and not faults' -n 2 --dist worksteal

test-faults: install ## Kill, fill disks, damage files: test what the program promises
	$(BIN)/python -m pytest tests/faults -m faults

HARNESS ?= all
SECONDS ?= 60
fuzz: install ## Feed damaged files and words to every reader: HARNESS=all SECONDS=60 for each
	$(BIN)/python -m tests.fuzz $(HARNESS) $(SECONDS)

LOCK := --generate-hashes --strip-extras --allow-unsafe --no-annotate --no-header --no-emit-index-url
LOCK += --no-emit-trusted-host --no-emit-find-links
lock: install ## Write requirements.lock: the versions of constraints.txt with their hashes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[release]'
	$(BIN)/pip-compile --quiet $(LOCK) -c constraints.txt -o requirements.lock pyproject.toml

lint: install ## Look for mistakes
	$(BIN)/ruff check .

typecheck: install ## Check the types
	$(BIN)/mypy

docs: install ## Build the documentation in site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

check: install ## Format check, lint, types, documentation and tests: what must pass at each commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest $(QUICK)

coverage: install ## Show which lines the tests run, the slow ones included
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not faults'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

format: install ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove caches and the virtual environment (outputs/ is kept)
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* htmlcov build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
