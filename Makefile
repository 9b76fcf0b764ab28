# A thin skin over the console command `longtake`: each target prints the command that it runs.
#   make train EXP=mebt_128f ARGS="--trainer.max_steps=1000 --data.batch_size=4"

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
LONGTAKE := $(VENV)/bin/longtake

EXP ?=
CKPT ?=
TOKENIZER ?=
RESUME ?=
STRATEGY ?=
GPUS ?= 8
OUT ?=
SOURCE ?=
DEST ?=
PROTOCOL ?=
RUNS ?=
RUN ?=
ARGS ?=

EXPERIMENTS := $(sort $(notdir $(basename $(wildcard experiments/*.yaml))))
CONFIG = --config experiments/$(EXP).yaml $(if $(STRATEGY),--config experiments/_base/trainer/$(STRATEGY).yaml )$(if $(TOKENIZER),--model.tokenizer=$(TOKENIZER))

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-quick test test-faults test-slow plan train sample evaluate compare report tokenize cache-frames import-weights export doctor tensorboard bench ablation lint format typecheck check clean _known_experiment

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "Variables: EXP= CKPT= TOKENIZER= RESUME= PROTOCOL= STRATEGY= GPUS= BUNDLE= ARGS=\"--any.option=value ...\""
	@echo "Experiments: $(EXPERIMENTS)"

setup: $(STAMP) ## create .venv and install the pinned dependencies into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Longtake needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) -V 2>&1). Give another: make PYTHON=python3.12"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## embedded video, a tokenizer, four priors, samples, scores, report; CPU, under 10 minutes
	$(LONGTAKE) demo $(ARGS)

demo-quick: $(STAMP) ## the tokenizer and MeBT alone, in 4 minutes
	$(LONGTAKE) demo --quick $(ARGS)

test: $(STAMP) ## run the whole test suite, in two processes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-faults: $(STAMP) ## kill runs with SIGKILL at random moments, and compare; minutes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m faults $(ARGS)

test-slow: $(STAMP) ## every experiment, benchmark and comparison at toy size, and what else takes long
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow $(ARGS)

_known_experiment:
	@test -f "experiments/$(EXP).yaml" || \
		{ echo "There is no experiment '$(EXP)'. EXP= one of: $(EXPERIMENTS)"; exit 1; }

# RESUME=auto|must|never looks for a run of EXP; anything else names one
ifneq ($(filter-out auto must never,$(RESUME)),)
train: $(STAMP) ## train EXP=... on all devices; RESUME=auto|must|never, or go on with RESUME=runs/<experiment>/version_<n>
	$(LONGTAKE) fit --resume $(RESUME) $(ARGS)
else
train: $(STAMP) _known_experiment
	$(LONGTAKE) fit $(CONFIG) $(if $(RESUME),--resume $(RESUME) )$(ARGS)
endif

ifdef BUNDLE
sample: $(STAMP)
	$(LONGTAKE) sample --bundle $(BUNDLE) $(ARGS)
else
sample: $(STAMP) _known_experiment ## videos from EXP=... CKPT=...: mp4s, a contact sheet, samples.json
	@test -f "$(CKPT)" || { echo "CKPT='$(CKPT)' is no file. CKPT= a checkpoint, e.g. runs/$(EXP)/version_0/checkpoints/last.ckpt"; exit 1; }
	$(LONGTAKE) sample $(CONFIG) --ckpt_path $(CKPT) $(ARGS)
endif

evaluate: $(STAMP) _known_experiment ## score EXP=... CKPT=... under PROTOCOL= one of experiments/protocols (default shapes_16)
	@test -f "$(CKPT)" || { echo "CKPT='$(CKPT)' is no file. CKPT= a checkpoint, e.g. runs/$(EXP)/version_0/checkpoints/last.ckpt"; exit 1; }
	$(LONGTAKE) evaluate $(CONFIG) --ckpt_path $(CKPT) $(if $(PROTOCOL),--protocol $(PROTOCOL)) $(ARGS)

compare: $(STAMP) ## one table and plot of evaluations: RUNS="runs/a/version_0 runs/b/version_0"
	@test -n "$(RUNS)" || { echo 'RUNS= folders with results.json in or below them, such as RUNS="runs/demo_mebt/version_0 runs/demo_tats/version_0"'; exit 1; }
	$(LONGTAKE) compare $(RUNS) $(if $(PROTOCOL),--protocol $(PROTOCOL)) $(ARGS)

report: $(STAMP) ## one page of curves, samples and scores: RUN=runs/<experiment>/version_<n>, or several
	@test -n "$(RUN)" || { echo 'RUN= folders of runs, such as RUN="runs/demo_mebt/version_0 runs/demo_tats/version_0"'; exit 1; }
	$(LONGTAKE) report $(RUN) $(ARGS)

tokenize: $(STAMP) _known_experiment ## codes of all clips of EXP=..., computed once; OUT= the folder
	@test -n "$(OUT)" || { echo "OUT= the folder to write to, such as data/codes/$(EXP)"; exit 1; }
	$(LONGTAKE) tokenize $(CONFIG) --out $(OUT) $(ARGS)

cache-frames: $(STAMP) _known_experiment ## videos of EXP=... decoded once, at training size; OUT= the folder
	@test -n "$(OUT)" || { echo "OUT= the folder to write to, such as data/frames/$(EXP)"; exit 1; }
	$(LONGTAKE) cache-frames --config experiments/$(EXP).yaml --out $(OUT) $(ARGS)

import-weights: $(STAMP) ## a model released by TATS or MeBT, SOURCE= its file, as the bundle DEST=weights/<name>
	@test -f "$(SOURCE)" || { echo "SOURCE='$(SOURCE)' is no file. SOURCE= a checkpoint of the official code"; exit 1; }
	@test -n "$(DEST)" || { echo "DEST= the folder to make, such as weights/vqgan3d_ucf101"; exit 1; }
	$(LONGTAKE) import-weights $(SOURCE) $(DEST) $(ARGS)

plan: $(STAMP) _known_experiment ## what EXP=... needs on GPUS=8: parameters, FLOPs, memory, hours, disk
	$(LONGTAKE) plan --config experiments/$(EXP).yaml --gpus $(GPUS) $(ARGS)

export: $(STAMP) ## turn the checkpoint CKPT=... of a tokenizer or a generator into the bundle OUT=weights/<name>
	$(LONGTAKE) export $(CKPT) $(OUT)

doctor: $(STAMP) ## what is wrong with a data set: ARGS="--data UCF101DataModule --data.root=..."
	$(LONGTAKE) doctor $(ARGS)

tensorboard: $(STAMP) ## curves and moving samples of all runs
	$(VENV)/bin/tensorboard --logdir runs $(ARGS) || { echo "Where the port is in use, give another: make tensorboard ARGS=--port=6007"; exit 1; }

# With an interpreter of one's own (make bench PYTHON=python3.12), that one is used as it is, and nothing is installed.
ifeq ($(origin PYTHON),command line)
bench: ## measure this machine: tables, and runs/bench/*.json; ARGS=--quick for toy sizes
	$(PYTHON) -m experiments.benchmarks $(ARGS)
else
bench: $(STAMP)
	$(VENV)/bin/python -m experiments.benchmarks $(ARGS)
endif

ablation: $(STAMP) ## a comparison on embedded data: NAME= a script of experiments/ablations; ARGS=--length=quick|short|long
	$(VENV)/bin/python -m experiments.ablations $(NAME) $(ARGS)

lint: $(STAMP) ## formatter and linter, without changing anything
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: $(STAMP) ## format, and repair what the linter can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

typecheck: $(STAMP) ## mypy over the packages
	$(VENV)/bin/mypy

check: lint typecheck test ## lint, types and tests: what CI runs

clean: ## remove caches and build products; runs/, weights/ and .venv stay
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
