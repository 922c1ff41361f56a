# `make` alone lists the targets. PYTHON=... and VARIANT=cpu|gpu are read by the set-up; ARGS=... goes to pytest.
# PROCESSES=... of `make test`: three keep two cores busy, since each waits a good deal, for engines and for Slurm.

.DEFAULT_GOAL := help
.PHONY: help setup quickstart ablations test test-fast test-gpu test-te test-layouts test-kills test-faults bench bench-gpu lint docs clean

VENV := .venv/bin
ARGS ?=
PROCESSES ?= 3
BY_FILE := --dist loadfile --no-loadscope-reorder

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## build .venv (Python 3.12, trainer and engine); again: a second if nothing changed
	@bash .ci/setup.sh

quickstart: setup  ## train a small MoE from scratch to RL on this machine, and write a report
	@$(VENV)/megatron-rl quickstart

ablations: setup  ## every example's ablation, 3 seeds (many hours; interrupted, it goes on where it was)
	@for file in examples/*/ablation.yaml; do \
		$(VENV)/megatron-rl ablate $$(basename $$(dirname $$file)) scale=tiny --readme $(ARGS) || exit; done

test: setup  ## all tests (starts real engines and several ranks), file by file in PROCESSES
	@$(VENV)/python -m pytest -n $(PROCESSES) $(BY_FILE) $(ARGS)

test-fast: setup  ## the tests that start neither an engine nor several ranks
	@$(VENV)/python -m pytest -n auto --maxprocesses 2 $(BY_FILE) -m "not slow" $(ARGS)

test-layouts: setup  ## one step in every parallel layout against a float64 reference, as a table
	@$(VENV)/python -m pytest tests/distributed/test_gradients.py $(ARGS)

test-gpu: setup  ## minutes on this machine's GPU, from doctor to RL, in the order of docs/gpu.md (`make test` hides GPUs)
	@MEGATRON_RL_TEST_GPU=1 $(VENV)/python -m pytest -v --durations=0 --session-timeout=480 -m gpu tests/card $(ARGS)

test-te: setup  ## Transformer Engine's layers without a GPU; TE_WHEEL=... is its torch extension (docs/gpu.md)
	@bash .ci/te_folder.sh build/te "$(TE_WHEEL)"
	@TE_FOLDER=build/te $(VENV)/python -m pytest tests/gpu/test_transformer_engine.py $(ARGS)

test-kills: setup  ## kill -9 of ranks and of the orchestrator in every phase, three times each: a table (minutes)
	@$(VENV)/python -m tests.engine.kills

test-faults: setup  ## engines (ten moments each: a table), environments, judges, prompts, queues, ranks fail (minutes)
	@FAULT_SEEDS=10 $(VENV)/python -m pytest -s tests/megatron_rl/orchestrator/test_faults.py tests/engine/test_faults.py \
		tests/engine/test_programs.py::test_a_rank_that_hangs_is_named_within_a_minute \
		tests/engine/test_programs.py::test_an_orchestrator_that_hangs_is_killed_and_started_again $(ARGS)

bench: setup  ## run every benchmark, print ours, anchor, ratio, limit (ARGS=--quick smoke, ARGS=--stored last results)
	@$(VENV)/python -m benchmarks $(ARGS)

bench-gpu: setup  ## on this machine's GPU: kernels against their floors, a slice of Ling-lite by backend, profiles in build/trace
	@$(VENV)/python -m benchmarks --gpu $(ARGS)

lint: setup  ## ruff over the whole tree, mypy over what others import, and a syntax check of the shell scripts
	@$(VENV)/ruff check .
	@$(VENV)/mypy
	@bash -n .ci/setup.sh .ci/run .ci/te_folder.sh

docs: setup  ## the documentation as a site, in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build

clean:  ## remove caches and build leftovers; keeps .venv and runs/
	@rm -rf build .pytest_cache .ruff_cache *.egg-info
	@find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
