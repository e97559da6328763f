# Everything here makes its own environment first: Python 3.11 and a C++ compiler are enough.

IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c "$(IS_311)" 2>/dev/null && command -v $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
STAMP := $(VENV)/.installed

# Threads that spin while they wait stall each other on shared cores.
demo test test-dist test-full compat: export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-dist test-full lint docs bench compat lock clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make .venv with the locked packages and this project

demo: $(STAMP) ## Serve small models in vLLM, train them, check that the two agree
	$(BIN)/python -m examples.demo

test: lint ## Lint, types and the fast tests
	$(BIN)/python -m pytest -m "not slow"

test-dist: $(STAMP) ## What needs two ranks: tests/dist, and tests/custom_models under torchrun
	$(BIN)/python -m pytest tests/dist

test-full: lint ## Everything, the slow tests too
	$(BIN)/python -m pytest

lint: $(STAMP) ## Ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(STAMP) ## Measure against vLLM's own Qwen3 and its Transformers backend
	mkdir -p runs
	$(BIN)/vllm-graft bench --shape 0.5b --arch Qwen3TorchTitan \
		--against vllm --against transformers --batch-size 1 --batch-size 8 --batch-size 32 \
		--dtype bfloat16 --json runs/bench.json --png runs/bench.png

lock: $(STAMP) ## Resolve requirements/cpu.in into requirements/cpu.txt
	$(BIN)/python scripts/lock.py

# Its own environment, .venv-VERSION, with the vLLM release that VLLM names.
compat: ## Test another vLLM release: make compat VLLM=0.31.0
	@test -n "$(VLLM)" || { echo "error: which release? make compat VLLM=0.31.0" >&2; exit 2; }
	$(MAKE) .venv-$(VLLM)/.installed
	.venv-$(VLLM)/bin/python -m pytest tests/contract tests/serve

clean: ## Remove the environments and everything built
	rm -rf .venv .venv-* build dist site runs .mypy_cache .ruff_cache .pytest_cache

$(STAMP): $(LOCK) pyproject.toml
	$(call create_venv,$(VENV))
	$(call install_into,$(VENV),$(LOCK))

.venv-%/requirements.txt: $(LOCK) requirements/cpu.in scripts/lock.py | $(STAMP)
	$(call create_venv,.venv-$*)
	$(BIN)/python scripts/lock.py --vllm $* --output $@

.venv-%/.installed: .venv-%/requirements.txt pyproject.toml
	$(call install_into,.venv-$*,$<)

.PRECIOUS: .venv-%/requirements.txt .venv-%/.installed

define create_venv
	@test -n "$(PYTHON)" && $(PYTHON) -c "$(IS_311)" || \
		{ echo "error: Python 3.11 not found; install it or set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

# The lock is complete, so nothing is resolved: --no-deps also keeps out the CUDA
# builds that vLLM asks for (requirements/cpu.txt says which).
define install_into
	$(1)/bin/python -m pip install --quiet --no-deps -r $(2)
	$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(1)/.installed
endef
