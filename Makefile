# Everything below needs only python3 with venv: the first target installs the rest from uv.lock into .venv.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.8

.PHONY: help setup demo serve test check format docs bench attack soak clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit("claude-wrapper needs Python 3.11 or newer; this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv || { echo "python3 cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.ready: $(BIN)/uv pyproject.toml uv.lock tests/mcpservers/npm/package-lock.json
	@$(BIN)/uv sync --frozen --quiet
	@UV_PROJECT_ENVIRONMENT=.venv-sdk1 $(BIN)/uv sync --frozen --quiet --only-group sdk1 --no-install-project
	@UV_PROJECT_ENVIRONMENT=.venv-mcp $(BIN)/uv sync --frozen --quiet --only-group mcp --no-install-project
	@if command -v npm >/dev/null; then npm ci --prefix tests/mcpservers/npm --ignore-scripts --no-audit --no-fund --silent \
	    || echo "npm could not install the MCP server of the tests, which will be skipped" >&2; \
	  else echo "npm is not installed: the tests of an MCP server from npm will be skipped" >&2; fi
	@touch $@

setup: .venv/.ready ## Install everything from the lock file

demo: setup ## Start a server, hold a conversation, show what was measured
	@$(BIN)/claude-wrapper demo

serve: setup ## Start the server on embedded defaults
	@$(BIN)/claude-wrapper serve

test: setup ## Run every test
	@$(BIN)/pytest -n auto --dist loadfile

check: setup ## Format, lint, types, import directions, generated documents
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: setup ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix-only --quiet .

docs: setup ## Write the generated documents (settings, metrics, scopes, security levels)
	@$(BIN)/python -m claude_wrapper.cli.documents

bench: setup ## Measure, as ratios side by side; prints tables and writes bench/results/
	@$(BIN)/python -m bench

attack: setup ## Attack every sandbox level from the inside
	@$(BIN)/python -m claude_wrapper.testing.attack

soak: setup ## Ten minutes of load and faults; SOAK_SECONDS, SOAK_SEED and SOAK_REPLICAS change length, plan and replicas
	@$(BIN)/python -m claude_wrapper.testing.soak --seconds $(or $(SOAK_SECONDS),600) --seed $(or $(SOAK_SEED),1) $(if $(SOAK_REPLICAS),--replicas $(SOAK_REPLICAS)) --report docs/soak

clean: ## Remove what the targets above installed
	rm -rf .venv .venv-sdk1 .venv-mcp tests/mcpservers/npm/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
