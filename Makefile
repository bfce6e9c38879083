# `make help` lists what there is. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

# The real samples are found by themselves when they lie beside the checkout. `CANOPY_SAMPLES= make test` goes without.
ifeq ($(origin CANOPY_SAMPLES),undefined)
SAMPLES := $(shell cd ../shared/data 2>/dev/null && pwd)
ifneq ($(SAMPLES),)
export CANOPY_SAMPLES := $(SAMPLES)
endif
endif

# More words for pytest, for example `make test PYTEST_ARGS="tests/tiler -x"`.
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-qgis test-browser lint bench notebooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## the whole pipeline on a scene whose heights are known, into demo/
	$(VENV)/bin/canopy demo

# Two processes, a file of tests in one of them; each with one thread, or they would fight for the cores.
TEST := OMP_NUM_THREADS=1 $(RUN) pytest -n $(TEST_PROCESSES) --dist loadfile

test: $(VENV)/.installed-dev ## the tests but the slow ones and the benchmarks
	$(TEST) -m "not bench and not slow and not qgis and not browser" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## the tests marked slow
	$(TEST) -m "slow and not bench and not qgis and not browser" $(PYTEST_ARGS)

# QGIS is installed for an interpreter of the system's, not for the one in .venv.
export QGIS_PYTHON ?= /usr/bin/python3

test-qgis: $(VENV)/.installed-dev ## the tests that ask the real QGIS (Debian: apt install python3-qgis)
	@QT_QPA_PLATFORM=offscreen $(QGIS_PYTHON) -c 'import qgis.core' 2> /dev/null || \
		{ echo "$(QGIS_PYTHON) has no QGIS; install it (Debian, Ubuntu: apt install python3-qgis) or name another: make test-qgis QGIS_PYTHON=…" >&2; exit 1; }
	$(RUN) pytest -m "qgis and not bench" $(PYTEST_ARGS)

test-browser: $(VENV)/.installed-dev ## the tests that drive a real browser (Debian's chromium)
	$(RUN) pytest -m "browser and not bench" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff (rules and format) and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(VENV)/.installed-dev ## the benchmarks, with the ratios they measure
	$(RUN) pytest -m bench -s $(PYTEST_ARGS)

notebooks: $(VENV)/.installed-dev ## run the walk-throughs and keep their outputs
	cd notebooks && PATH="$(CURDIR)/$(VENV)/bin:$$PATH" jupyter execute --inplace *.ipynb

clean: ## remove what the demo, the tests and the tools wrote; .venv, tile sets and training runs stay
	rm -rf demo build dist notebooks/out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find canopy tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts into a new environment: without it the environment is missing or half made.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "canopy needs Python 3.11 or newer, which $(PYTHON) is not; name one, for example: make PYTHON=python3.12" >&2; exit 1; }
@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
endef

# The installation fetched it, or said nothing, because pip does not show what a build says: this says it, in one line.
maplibre = @$(RUN) canopy.view.maplibre || true

$(VENV)/.installed: pyproject.toml requirements.lock
	$(environment)
	$(RUN) pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	$(maplibre)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml requirements.lock
	$(environment)
	$(RUN) pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	$(maplibre)
	@touch $(VENV)/.installed $@
