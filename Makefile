# make demo     installs raylm in .venv, then runs the main job: python -m raylm.tune
# make test     installs what the tests need too, then runs every test but the slow ones; make test-all: those too
# make lint     ruff, mypy, and hadolint for the Dockerfile
# make bench    measures raylm beside other ways to do the same, half an hour, and writes docs/performance.md
# make release-check    builds sdist and wheel, checks them, and installs and starts the wheel in clean environments
# make setup    .venv with all of it; repeated only when pyproject.toml or constraints.txt change

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: setup demo test test-all lint bench release-check

PYTHON ?= python3
# By its path, so that a virtual environment that happens to be active makes no difference.
VENV := .venv/bin/python
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

setup: .venv/dev

demo: .venv/raylm
	@$(VENV) -m raylm.tune

test: setup
	@$(VENV) -m pytest

test-all: setup
	@$(VENV) -m pytest -m ""

lint: setup
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy
	@.venv/bin/hadolint Dockerfile

bench: setup
	@$(VENV) benchmarks/bench.py

# What goes to a package index, and what a person gets from there: by each of these Pythons that is here, at the newest
# versions that pyproject.toml takes, not those of constraints.txt. Some minutes and 2 GB each.
PYTHONS ?= python3.11 python3.12 python3.13
TWINE := twine==7.0.0

release-check: setup
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; rm -rf dist; \
	$(VENV) -m hatchling build -t sdist; \
	$(VENV) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz; \
	$(VENV) -m venv "$$fresh/twine"; "$$fresh/twine/bin/pip" install --quiet '$(TWINE)'; \
	"$$fresh/twine/bin/twine" check --strict dist/*; \
	cd "$$fresh"; for python in $(PYTHONS); do \
		$$python -c '' 2>/dev/null || { echo "$$python is not here: not tried"; continue; }; \
		$$python -m venv "$$python"; "$$python/bin/pip" install --quiet "$(CURDIR)"/dist/*.whl; \
		"$$python/bin/raylm" --help >help; "$$python/bin/raylm" tune --dry-run >plan; \
		echo "$$("$$python/bin/raylm" --version) starts with $$python"; rm -rf "$$python"; \
	done

# Everything that builds a package is installed first, in the versions of constraints.txt, because some dependencies of
# the tests come as source only (rouge_score, sqlitedict, word2number) and a build in isolation ignores constraints.
BUILD := hatchling editables setuptools

# What pip does becomes one line that changes on a terminal, and nothing elsewhere; its errors stay as they are.
PIP := $(VENV) -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
ONE_LINE := { if [ -t 2 ]; then \
	while read -r verb what; do case $$verb in Collecting|Downloading|Installing) \
		printf '\r\033[K  %s %.60s' "$$verb" "$$what" >&2 ;; esac; done; printf '\r\033[K' >&2; \
	else cat >/dev/null; fi; }

.venv/raylm: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "raylm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not found). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing raylm in .venv: about 130 packages, 2 GB, a few minutes the first time …"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(BUILD) | $(ONE_LINE)
	@$(PIP) --no-build-isolation --editable '.[all]' | $(ONE_LINE)
	@touch $@

.venv/dev: .venv/raylm
	@echo "Installing what the tests need in .venv: about 60 packages more …"
	@$(PIP) --no-build-isolation --editable '.[all,dev]' | $(ONE_LINE)
	@touch $@
