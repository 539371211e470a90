# make demo     set-up, then the main job: python -m raylm.tune
# make test     set-up, then every test but the slow ones; make test-all: those too
# make lint     set-up, then ruff and mypy
# make setup    .venv with everything in it; done again only when pyproject.toml or constraints.txt change

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: setup demo test test-all lint

PYTHON ?= python3
# By its path, so that a virtual environment that happens to be active makes no difference.
VENV := .venv/bin/python
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

setup: .venv/ready

demo: setup
	@$(VENV) -m raylm.tune

test: setup
	@$(VENV) -m pytest

test-all: setup
	@$(VENV) -m pytest -m ""

lint: setup
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

# What pip does becomes one line that changes on a terminal, and nothing elsewhere; its errors stay as they are.
PIP := $(VENV) -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
ONE_LINE := { if [ -t 2 ]; then \
	while read -r verb what; do case $$verb in Collecting|Downloading|Installing) \
		printf '\r\033[K  %s %.60s' "$$verb" "$$what" >&2 ;; esac; done; printf '\r\033[K' >&2; \
	else cat >/dev/null; fi; }

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "raylm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not found). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv: about 190 packages, 2 GB, a few minutes the first time …"
	@$(PYTHON) -m venv .venv
	@$(PIP) hatchling editables | $(ONE_LINE)
	@$(PIP) --no-build-isolation --editable '.[all,dev]' | $(ONE_LINE)
	@touch $@
