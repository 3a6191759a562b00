# Every target makes .venv and installs what it needs, again only when pyproject.toml changed.
#   make serve ARGS="--port 9000"     make test ARGS="-k scheduler -x"     make PY=python3.12 test

PY ?= python3
ARGS ?=
OUT ?= build/demo
BENCH ?= $(filter-out benchmarks/_% benchmarks/plot.py,$(wildcard benchmarks/*.py))
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-8s%s\n", $$1, $$2}' Makefile

serve: .venv/.serve ## serve the bundled demo model, or what ARGS says
	.venv/bin/pagedserve serve $(ARGS)

test: .venv/.test ## run the tests
	$(PYTHON) -m pytest -q $(ARGS)

marathon: .venv/.test ## run the long forms of the tests of survival
	$(PYTHON) -m pytest -q -m marathon --timeout=3600 $(ARGS)

check: .venv/.check ## format, lint, types and the laws of imports
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -qq tests/test_architecture.py

# Some scripts ask a running server or want a GPU; without one they say so, and the others run all the same.
bench: .venv/.test ## run the benchmarks, or BENCH=benchmarks/one.py; each prints one JSON line
	@status=0; for script in $(BENCH); do $(PYTHON) $$script $(ARGS) || status=1; done; exit $$status

# Not into pagedserve/demo: the bundled model is replaced by hand, once the new one has been looked at.
demo: .venv/.test ## train the demo model into OUT (build/demo); best on a GPU
	$(PYTHON) examples/train_demo/train.py --out $(OUT) $(ARGS)

docs: .venv/.test ## write docs/models.md from the code and the catalogue
	@mkdir -p build
	$(PYTHON) -m pagedserve.models.catalog_page > build/models.md.part && mv build/models.md.part docs/models.md

clean: ## remove the environment and every cache
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What each stamp installs beside the package itself.
.venv/.serve: EXTRAS :=
.venv/.test: EXTRAS := [test]
.venv/.check: EXTRAS := [test,dev]

.venv/.serve .venv/.test .venv/.check: pyproject.toml
	@echo "installing pagedserve$(EXTRAS) into .venv: a minute or two, most of it PyTorch"
	$(PY) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@

# One pip at a time in one environment, also under make -j.
.NOTPARALLEL:
.PHONY: help serve test marathon check bench demo docs clean
