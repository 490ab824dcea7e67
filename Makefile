# Everything a person or a CI machine does with Transmute; `make help` lists it. Only POSIX sh and make are assumed.
.DEFAULT_GOAL := help

# The interpreter that builds .venv (setup) or runs gpu-check; empty: the first fitting one on PATH.
PYTHON ?=
# Where the CPU build of torch comes from; https://download.pytorch.org/whl/cu130 gives a CUDA one, an empty value
# leaves it to pip's own settings.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Test processes, and the tests left out; `make test MARKERS=slow` runs the slow ones.
JOBS ?= 2
MARKERS ?= not slow and not network
# The folder of gpu-check's report.
OUT ?= docs/benchmarks

VENV := .venv/bin
STAMP := .venv/.requirements-installed
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
USABLE := import ensurepip, venv; $(RECENT)
HAS_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())

.PHONY: help setup quickstart test lint format bench gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## build .venv with the pinned packages; once, and again when requirements.txt changes

$(STAMP): requirements.txt
	@if ! $(VENV)/python -c "$(RECENT)" 2>/dev/null || ! $(VENV)/python -m pip --version >/dev/null 2>&1; then \
	    found=; \
	    for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	        if $$candidate -c "$(USABLE)" 2>/dev/null; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "Transmute needs Python 3.11 or newer with the venv module; $(or $(PYTHON),PATH) has none." >&2; \
	        echo "Install it (Debian, Ubuntu: python3.11 and python3.11-venv) or name one:" >&2; \
	        echo "    make setup PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "building .venv with $$found"; \
	    $$found -m venv --clear .venv; \
	fi
	@# torch alone first, from its own index and with short timeouts: the other packages never ask that index, and
	@# a machine that cannot reach it goes on with pip's own settings.
	$(VENV)/python -m pip install --no-input --no-deps --retries 2 --timeout 20 \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(VENV)/python -m pip install --no-input -r requirements.txt
	@touch $@

quickstart: setup  ## convert the bundled teacher on real text, on the CPU; ends with a table and plots
	$(VENV)/python train.py experiment=quickstart

test: setup  ## run the CPU test suite in two processes (JOBS=)
	$(VENV)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(MARKERS)"

lint: setup  ## check style and spelling, changing nothing
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/codespell

format: setup  ## apply the style to every Python file
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

bench: setup  ## check and time the kernel backends on this machine
	$(VENV)/python benchmark.py suite=kernels

# No set-up: a GPU image brings its own torch; Hydra is not needed. A GPU that no torch here can use is a failure, no GPU
# at all is none.
gpu-check:  ## check and time the kernels where a GPU is, in nine minutes; PYTHON= the interpreter, OUT= the folder
	@set -e; found=; \
	for candidate in $(or $(PYTHON),$(VENV)/python python3 python); do \
	    if $$candidate -c "$(HAS_GPU)" 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ] && { nvidia-smi -L 2>/dev/null | grep -q GPU || [ -e /dev/kfd ]; }; then \
	    echo "gpu-check: a GPU is here, but no torch of $(or $(PYTHON),$(VENV)/python, python3 or python) can use it;" >&2; \
	    echo "name the interpreter: make gpu-check PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	if [ -z "$$found" ]; then echo "gpu-check: no GPU here; nothing was run"; exit 0; fi; \
	$$found -m kernels.bench.gpu_check --out $(OUT)

clean:  ## remove what the tools left behind; .venv and outputs/ stay
	rm -rf .pytest_cache .ruff_cache
	find . \( -path ./.venv -o -path ./.git -o -path ./outputs \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
