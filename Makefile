# Two commands matter: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
export NASLINE_SHARED ?= $(abspath ../shared)

.PHONY: help install demo test test-all lint up down secrets bench soak clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## Create .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pipeline,stack,tracking,test]'
	@touch $@

demo: install  ## Run the whole DAG: make demo [DATASET=dir [PRETRAIN=dir] [UNLABELED=dir] [PARAMS=file]] [GATE=fail]
	@$(BIN)/python demo/run.py $(if $(DATASET),--dataset '$(DATASET)') $(if $(PRETRAIN),--pretrain '$(PRETRAIN)') \
	  $(if $(UNLABELED),--unlabeled '$(UNLABELED)') $(if $(PARAMS),--params '$(PARAMS)') $(if $(GATE),--gate $(GATE))

# One process per group: with Airflow, torch and OpenVINO in one interpreter, signals crashed it now and then.
# Two groups at a time, the longest first; a group's output is printed when it has ended.
FAST_GROUPS := tests/model tests/pipeline_tasks+tests/chain tests/dags+tests/stack+tests/demo+tests/browser \
  tests/test_agreement.py+tests/test_imports.py
SLOW_GROUPS := tests/chain tests/stack tests/dags tests/demo tests/browser tests/model tests/pipeline_tasks
TWO_AT_A_TIME := @OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 --output-sync=target

test: install lint  ## Lint, types and the fast tests (offline)
	$(TWO_AT_A_TIME) $(addprefix fast/,$(FAST_GROUPS))

test-all: test  ## Also real servers, the browser, the demo and a short run on real photographs
	$(TWO_AT_A_TIME) $(addprefix slow/,$(SLOW_GROUPS))

fast/%:
	@echo "fast: $(subst +, ,$*)"; $(BIN)/pytest -m 'not slow and not browser and not gpu' $(subst +, ,$*)

slow/%:
	@echo "slow: $(subst +, ,$*)"; $(BIN)/pytest -m 'slow or browser' $(subst +, ,$*)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

up: install  ## Start Airflow and the MLflow UI on loopback
	@$(BIN)/python stack/services.py up

down:  ## Stop what `make up` started
	@$(BIN)/python stack/services.py down

secrets:  ## Write .env for docker-compose.yml: random passwords and keys; adds those that an older one lacks
	@$(PYTHON) stack/make_secrets.py

bench: install  ## Measure what the README claims; rows go to benchmarks/results (never in CI)
	$(BIN)/python benchmarks/real_photographs.py

soak: install  ## Kill the chain's steps at random until 100 kills are stored (hours, never in CI)
	$(BIN)/python benchmarks/soak.py run

clean:  ## Remove the demo's and the stack's files, not the virtual environment
	rm -rf .demo .stack outputs
