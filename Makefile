# Everything happens in .venv, which is made once and kept; `make help` lists the targets.
#
# PYTHON  the interpreter that .venv is made with (3.11 or newer):  make install PYTHON=python3.12
# TORCH   what pip installs for torch, options and all. To take CPU wheels, or those of another CUDA, name the
#         index that carries them:  make demo TORCH="torch torchvision --index-url https://INDEX/cpu"
#         It is read when .venv is filled; to change it later, remove .venv and install again.
# PYTEST_ARGS  what pytest gets:  make test PYTEST_ARGS="tests/test_blocks.py -x"
# BENCH_ARGS   what the benchmarks get:  make bench BENCH_ARGS="--rounds 1"

# `python3` if it is new enough, else the newest versioned one there is.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; exit; fi; \
	done; echo python3)
TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
NEXTBLOCK := .venv/bin/nextblock
DEMO := runs/demo

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one .venv would meet
.PHONY: help install demo test test-slow docs bench gpu-check lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /:/' | awk -F: '{ printf "make %-10s %s\n", $$1, $$2 }'

install: .venv/.installed ## nextblock and what it needs, into .venv

demo: .venv/.installed ## pre-train on 1,797 handwritten digits, probe, draw, report, all in runs/demo
	$(NEXTBLOCK) pretrain --preset xtra-tiny --data.train digits:split=train --data.val digits:split=test --out $(DEMO)
	$(NEXTBLOCK) probe --model $(DEMO) --train digits:split=train --test digits:split=test \
		--epochs 30 --batch_size 64 --lr 3e-3 --baselines true --out $(DEMO)/probe --overwrite
	$(NEXTBLOCK) predict --model $(DEMO) --data digits:split=test --out $(DEMO)/predictions
	$(NEXTBLOCK) report $(DEMO)

# Tests run side by side, so each process gets one thread.
test test-slow: export OMP_NUM_THREADS ?= 1
test: .venv/.installed-test ## the tests that take seconds
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

test-slow: .venv/.installed-test ## the tests that take minutes
	$(VENV_PYTHON) -m pytest -m slow $(PYTEST_ARGS)

docs: .venv/.installed-test ## the documentation as a site, in docs/_build/html
	$(VENV_PYTHON) -m sphinx -W --keep-going -q docs docs/_build/html

bench: .venv/.installed ## speed against plain alternatives; about 25 minutes on two cores
	for script in step data probe load complete; do $(VENV_PYTHON) benchmarks/$$script.py $(BENCH_ARGS) || exit; done

gpu-check: .venv/.installed-test ## GPU tests and benchmarks in 8 minutes, into gpu-check.json
	$(VENV_PYTHON) benchmarks/gpu_check.py

lint: .venv/.installed-test ## ruff (rules and format) and pyright
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m pyright

format: .venv/.installed-test ## fix what ruff can fix, and format
	$(VENV_PYTHON) -m ruff check --fix
	$(VENV_PYTHON) -m ruff format

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist docs/_build .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make pip run once, and again when pyproject.toml changes. The test extra includes all of `install`.
.venv/.installed: pyproject.toml | $(VENV_PYTHON)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e .
	touch $@

.venv/.installed-test: pyproject.toml | $(VENV_PYTHON)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e '.[test]'
	touch .venv/.installed $@

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "nextblock needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Install one and name it, for example: make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
