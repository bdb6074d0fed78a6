# Everything runs in .venv, which the targets make for themselves. PYTHON: the interpreter to make it with.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Only wheels, so that no set-up needs a compiler; compiled to bytecode afterwards, by every core, but for other packages'
# own tests and the models of transformers, half of all code, of which next to nothing is ever imported.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --only-binary :all: -c constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib
PYTEST := $(BIN)/python -m pytest --durations=60 --max-worker-restart 2

# Tests start hundreds of interpreters; each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test pytest soak wheel-test tutorial-test slurm-test lint format browser slurm docs bench clean

help: ## Say what can be made.
	@echo 'distinfluence: influence functions of PyTorch models. Needs Python 3.11 or newer; the rest installs into $(VENV).'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Set up .venv for development.

demo: $(VENV)/.demo ## Install what the demo needs and find mislabelled digits (the result: distinfluence-demo/).
	@$(BIN)/distinfluence demo

test: lint pytest ## Install everything for development, then lint, check types and run the tests (-j 2: side by side).

pytest: $(VENV)/.dev
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --junitxml=build/tests.xml

slurm-test: $(VENV)/.dev ## Run the tests that need SLURM, each process on a SLURM of its own; installs it on Debian, as root.
	DISTINFLUENCE_SLURM=required $(PYTEST) -m "slurm and not soak" -n 3 --dist load --maxschedchunk=1 \
	  -o timeout=600 -o faulthandler_timeout=700 --junitxml=build/slurm-tests.xml tests/slurm

soak: $(VENV)/.dev ## Run the long tests and keep their table: twenty kills a stage, SLURM's own limits, a thousand workers, …
	$(BIN)/python -m tests.benchmarks soak scale

wheel-test: $(VENV)/.dev ## Install the built wheel where nothing else is, without a compiler, and run the README there.
	$(BIN)/python -m tests.first_minutes wheel

tutorial-test: $(VENV)/.dev ## Follow the tutorial in a fresh clone and a fresh environment, made as it says.
	$(BIN)/python -m tests.first_minutes tutorial

lint: $(VENV)/.dev ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Sort imports, mend what ruff can mend, and format.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

browser: ## Install Debian's Chromium, if there is none, for the tests of the page (needs root); they are skipped without.
	@test -x "$${DISTINFLUENCE_CHROMIUM:-/usr/bin/chromium}" || { \
	  echo 'Installing Chromium …'; export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

slurm: ## Install Debian's SLURM, if there is none, for the tests that need one (needs root).
	@$(PYTHON) -c 'from tests.slurm.host import install; install()'

docs: $(VENV)/.dev ## Build the documentation into docs/_build/html; warnings are errors.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo 'The documentation is in docs/_build/html/index.html.'

bench: $(VENV)/.dev ## Run the benchmarks, or those named in ONLY="…", and keep their tables in docs/benchmarks (hours).
	$(BIN)/python -m tests.benchmarks $(ONLY)

clean: ## Remove the environment, caches and built documentation; results stay.
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written when its set-up is complete, and only then: an interrupted one is done again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "distinfluence needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Making $(VENV) …'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'Installing (a minute or two; PyTorch is large) …'
	@$(INSTALL) -e '.[demo]'
	@$(COMPILE) || true # some packages bring templates that are not Python
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'Installing (a few minutes; PyTorch is large) …'
	@$(INSTALL) -e '.[demo,browse,slurm,docs,test]'
	@$(COMPILE) || true
	@touch $@ $(VENV)/.demo
