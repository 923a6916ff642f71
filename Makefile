# Everything runs inside .venv, which `install` makes; nothing needs to be activated.
PYTHON ?= python3
ARGS ?=
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
NPROC ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),1)
CORES := $(shell nproc 2>/dev/null || echo 1)

BIN := .venv/bin
# One process needs no launcher, whose own traceback would follow each message of ours, Ctrl-C's too.
TORCHRUN := $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))
# uv does not read pip's settings, so a local folder of wheels is passed on.
WHEELS = $${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)}
CPU_TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline DS_ACCELERATOR=cpu

.PHONY: help install train test test-gpu check
.DEFAULT_GOAL := help

help: ## show these lines
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.ok ## make .venv and install everything into it (a minute, or more where torch is downloaded)

train: .venv/.ok ## pretrain a small NSA model on real text; ARGS="attention=full" trains the baseline
	@WORLD_SIZE=$(NPROC) $(BIN)/python -m nsa_train config $(ARGS) > /dev/null
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($(CORES) + $(NPROC) - 1) / $(NPROC) ))} \
	$(BIN)/python $(TORCHRUN) -m nsa_train train $(ARGS)

test: .venv/.ok ## all tests that need no GPU
	$(CPU_TESTS) $(BIN)/python -m pytest -n 2 -m "not gpu"

test-gpu: .venv/.ok ## the tests that need a GPU
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -m gpu

check: .venv/.ok ## lint, format and types, of the Dockerfile too
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/Dockerfile; fi

.venv/.ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "nsa_train needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	@echo "installing into .venv: a minute, or more where torch has to be downloaded"
	@$(PYTHON) -m venv .venv
	@if $(BIN)/python -m pip install -q uv==0.13.9; then \
	UV_FIND_LINKS="$(WHEELS)" $(BIN)/uv pip install --compile-bytecode -p $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'; fi
	@touch $@
