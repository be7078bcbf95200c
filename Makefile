# Needs python3 (3.10 or newer) with venv, and make. Every target creates .venv and installs into it what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Options that `make launch` passes to `bm3il train`; ARGS holds any others, e.g. ARGS="--learner.batch-size 512".
flag = $(if $($(1)),--$(2) '$($(1))')
FLAGS = $(call flag,PRESET,preset) $(call flag,NODES,nodes) $(call flag,ALGORITHM,algorithm) \
	$(call flag,ENVIRONMENT,environment) $(call flag,DEMONSTRATIONS,demonstrations) $(call flag,RUN,run) \
	$(call flag,SEED,seed) $(call flag,STEPS,steps) $(call flag,ACTORS,actors) $(call flag,MODE,mode) \
	$(call flag,HOSTFILE,hostfile) $(ARGS)

OF_LAUNCH := NODES PRESET ALGORITHM ENVIRONMENT DEMONSTRATIONS RUN SEED STEPS ACTORS MODE HOSTFILE ARGS

# Unknown variables are errors: make would ignore a misspelt one, and train another run than the one asked for.
KNOWN := $(OF_LAUNCH) SECONDS KIND QUICK PYTHON VENV
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
NEAREST = import sys; from bm3il.protocol.errors import unknown_name; print(unknown_name("variable", sys.argv[1], sys.argv[2:]))
UNKNOWN := $(firstword $(filter-out $(KNOWN),$(GIVEN)))
ifneq ($(UNKNOWN),)
$(error $(or $(shell $(PYTHON) -c '$(NEAREST)' '$(UNKNOWN)' $(KNOWN)),unknown variable '$(UNKNOWN)'; known: $(KNOWN)))
endif

.DEFAULT_GOAL := help
.PHONY: help launch submit test lint bench reproduce chaos soak fuzz docs

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables of launch: $(OF_LAUNCH)"

launch: $(VENV)/.installed  ## train a run, by default on demonstrations that come with bm3il
	@$(BIN)/bm3il train $(FLAGS)

# The tests of a module run in one process, so that their fixtures are made only once; ARGS="-n 0" runs all one by one.
test: $(VENV)/.installed-dev  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

lint: $(VENV)/.installed-dev  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

NO_BENCHMARKS := reproduce figures claims contexts meeting floors backpressure soak resident_memory random_data ranking closures worlds chaos chaos_of_simulators unsteady hosts slurm_cluster fuzz fuzz_cases fuzz_live fuzz_sockets
bench: $(VENV)/.installed-dev  ## run the benchmarks, against the best that this machine can do
	@failed=0; for file in $(filter-out $(NO_BENCHMARKS:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file $(ARGS) || failed=1; done; exit $$failed

reproduce: $(VENV)/.installed  ## run the studies behind the results and draw their figures; QUICK=1: small, 20 minutes; continues after a stop
	@$(BIN)/python benchmarks/reproduce.py $(if $(QUICK),--quick) $(ARGS)

submit: $(VENV)/.installed  ## submit a run to Slurm; takes the variables of launch
	@$(BIN)/bm3il submit $(FLAGS)

docs: $(VENV)/.installed-docs  ## build the documentation into site/; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site/index.html"

SECONDS ?= 600
chaos: $(VENV)/.installed-dev  ## random faults in the processes of runs: SECONDS=600 SEED=1 MODE=lockstep; in simulators: KIND=simulator
	@$(BIN)/python benchmarks/chaos.py --seconds $(SECONDS) $(call flag,SEED,seed) $(call flag,MODE,mode)$(if $(KIND), --kind '$(KIND)') $(ARGS)

soak: $(VENV)/.installed-dev  ## a long run at full speed: checks that memory stays flat and counters add up (SECONDS=3600)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --seconds $(SECONDS) $(ARGS)

fuzz: $(VENV)/.installed-dev  ## send malformed messages and files to everything that reads them (ARGS="--cases 1000000")
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "python3 must be 3.10 or newer, this is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

INSTALLING = @echo "installing into $(VENV): minutes the first time, since PyTorch is large"

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(INSTALLING)
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(INSTALLING)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALLING)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@
