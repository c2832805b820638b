# Longspan's commands. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
RANKS ?= 2
ARGS ?=
TEST_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
# A machine with a GPU and its own torch needs no .venv: pip install --no-deps --no-build-isolation -e .
PY = $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_TESTS = $(shell grep -l 'mark\.gpu' tests/test_*.py)
# torchrun would give each rank one thread.
THREADS = $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores > $(RANKS) ? cores / $(RANKS) : 1)))
ROOMS := conf kernels parallel models train launch
TYPED = $(addprefix .mypy/longspan/,__init__.py $(sort $(dir $(wildcard $(ROOMS:=/*.py)))))

.PHONY: help install train test test-all check lint format-check types format gpu-test gpu-bench gpu-bench-steps slurm-test docs-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with everything that train and test need
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"longspan needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	@echo "installing into .venv, about a minute"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: $(INSTALLED) ## train the quickstart over 2 ranks; ARGS='parallel=ulysses ...' changes it
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m longspan.train experiment=quickstart $(ARGS)

# Tests that share worlds of ranks leave a quarter of the machine idle: those of one process run beside them,
# give way, and are shown last. What bash runs in the background ignores ^C, hence the trap.
# pytest ends with 2 after ^C, and with 5 where TEST_ARGS left no test.
define tests
	@log=$$(mktemp); \
	OMP_NUM_THREADS=1 nice $(BIN)/pytest --numprocesses auto --dist loadfile -m "$(1) and not ranks" $(TEST_ARGS) >$$log 2>&1 & \
	alone=$$!; trap 'kill $$alone 2>/dev/null || :; rm -f $$log' EXIT; code=0; last=0; \
	$(BIN)/pytest -m "$(1) and ranks" $(TEST_ARGS) || code=$$?; \
	[ $$code -ne 2 ] || exit 2; \
	[ $$code -ne 5 ] || code=0; \
	wait $$alone || last=$$?; \
	cat $$log; \
	[ $$last -eq 0 ] || [ $$last -eq 5 ] || code=$$last; \
	exit $$code
endef

test: check ## ruff, mypy and the fast tests
	$(call tests,not slow and not gpu and not slurm)

test-all: check ## ruff, mypy and every test that needs no GPU and no cluster
	$(call tests,not gpu and not slurm)

check: lint format-check types ## ruff and mypy

lint: $(INSTALLED)
	$(BIN)/ruff check .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check .

types: $(INSTALLED) | .mypy/longspan
	$(BIN)/mypy --num-workers auto $(TYPED) tests $(wildcard benchmarks/*.py)

# The root under the package's name, so that mypy sees longspan.kernels where the folder is kernels/.
.mypy/longspan:
	@mkdir -p .mypy && ln -s .. $@

format: $(INSTALLED) ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-test: ## the tests that need a CUDA device, with .venv or the python3 that has torch
	$(if $(GPU_TESTS),$(PY) -m pytest -m gpu $(TEST_ARGS) $(GPU_TESTS),@echo "no test is marked gpu")

gpu-bench: ## time the kernels on a CUDA device, 8 minutes, into benchmarks/results/
	$(PY) -m benchmarks.kernels $(ARGS)

gpu-bench-steps: ## time training steps of DiT-XL/2, a 1.3B video DiT and Llama-3.2-1B on a CUDA device, 8 minutes
	$(PY) -m benchmarks.steps $(ARGS)

slurm-test: $(INSTALLED) ## real SLURM jobs on a two-node cluster that it installs and starts here, as root
	$(BIN)/python tests/slurm_cluster.py $(TEST_ARGS)

docs-check: $(INSTALLED) ## run the commands that README and docs/ mark as runnable
	$(BIN)/python tests/docs_check.py README.md CONTRIBUTING.md docs/*.md

clean: ## remove what make and the tools made; runs stay
	rm -rf .venv .mypy .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
