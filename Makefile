# Everything on a fresh machine: `make demo` shows the main job, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test zoo lint bench gpu-check study docs model model-prose clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

setup: $(STAMP)  ## make .venv with the tested versions

# torch comes first and alone: the pinned version is a CPU build where the registry has one, and an open range would
# pull gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dpg needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## move the embedded model of prose, verify its data with stock PyTorch, show the picture
	rm -rf $(DEMO)
	$(BIN)/dpg run qr-embed --scale prose --out $(DEMO)
	$(BIN)/dpg verify $(DEMO)
	@echo "The picture: $(DEMO)/lm_head.png  The data: $(DEMO)/dataset/train.parquet"

# a process for each core with one thread each: small operations gain nothing by a second thread
test: $(STAMP)  ## all tests that CI needs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

zoo: $(STAMP)  ## every architecture, tied and untied, every data weight, AdamW and SGD, against stock PyTorch
	ZOO_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist load tests/zoo

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## time and memory of the metagradient, sampling, shares of a step (BERGSON=python of its environment)
	$(BIN)/python benchmarks/metagradient.py --workloads W1,T1,W1-MoE $(if $(BERGSON),--bergson $(BERGSON))
	$(BIN)/python benchmarks/lengths.py --lengths 512,1024,2048
	$(BIN)/python benchmarks/memory.py --repeats 1
	$(BIN)/python benchmarks/rollout.py

# on a card nothing is set up before: the check installs for itself, and says how long that takes
ifeq ($(DEVICE),cpu)
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check --device cpu --python $(BIN)/python $(GPU_CHECK)
else
gpu-check:  ## one card, bare machine to figures in at most nine minutes (DEVICE=cpu rehearses it with tiny shapes)
	$(PYTHON) -m benchmarks.gpu_check --device $(or $(DEVICE),cuda) $(if $(BERGSON),--bergson $(BERGSON)) $(GPU_CHECK)
endif

study: $(STAMP)  ## the study behind docs/results.md; goes on where it was (QUICK=1: a few minutes, into build/study-quick)
	$(BIN)/python -m benchmarks.study $(if $(QUICK),--quick)

docs: $(STAMP)  ## the references made anew, and the site into build/site
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

model: $(STAMP)  ## make the embedded model anew (five to eight minutes)
	$(BIN)/python -m dpg_cli.tiny.pretrain

model-prose: $(STAMP)  ## make the two embedded models of prose anew, from a Debian package's text (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m dpg_cli.prose.pretrain

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
