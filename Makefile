# Every verb of development and of use. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS_VENV := .venv-protos
PROMPT ?= What is the capital of France?
export PROMPT
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install run up down test lint format protos bench clean

help: ## List these verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

install: $(VENV)/.test ## Install everything, tests and linters included, into .venv

run: $(VENV)/.run ## Start a mesh, answer PROMPT="…", and stop it
	@$(BIN)/kvmesh run "$$PROMPT"

up: $(VENV)/.run ## Start a mesh and leave it running (ARGS="--decode 2 …")
	@$(BIN)/kvmesh up $(ARGS)

down: $(VENV)/.run ## Stop the mesh that `make up` started
	@$(BIN)/kvmesh down

# One thread a process: OpenMP's waiting threads spin, and would starve the services under test.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test $(PROTOS_VENV)/.installed ## Run the whole suite, real model included (ARGS="-k …")
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test ## Check style, types, import walls, protos and deploy files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/compose.yaml deploy/observability/compose.observability.yaml
	$(BIN)/check-jsonschema --schemafile deploy/helm/kvmesh/values.schema.json deploy/helm/kvmesh/values.yaml

format: $(VENV)/.test ## Bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(PROTOS_VENV)/.installed ## Generate src/kvmesh/v1 from protos/
	$(PROTOS_VENV)/bin/python protos/generate.py

bench: $(VENV)/.run ## Load a mesh and print latencies and goodput (ARGS="--rate 4 …")
	$(BIN)/kvmesh bench serve --up $(ARGS)

clean: ## Remove what was installed and cached
	rm -rf $(VENV) $(PROTOS_VENV) build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamps make a second run instant. What runs needs no test tools.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install -c constraints.txt -e '.[test,lint]'
	touch $@ $(VENV)/.run

# Apart, because the generators pin an older protobuf than services run on.
$(PROTOS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/pip install -e '.[protos]'
	touch $@
