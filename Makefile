# make demo           environment, then the main job on the embedded pair; ends with a table
# make demo-smollm2   the same with a real language model of 135 M parameters, which it fetches
# make results        OPD beside RL on the embedded pair, and all accelerators at three rates: half an hour
# make test           environment, then every test that needs neither GPU nor network
# make test-slow      the tests that it leaves out: kills, strategies, several processes, twice over
# make test-vllm      an environment with vLLM for CPUs, then the tests that need it
# make lint           ruff and mypy

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-smollm2 results test test-slow test-vllm lint clean

demo: .venv/installed
	$(BIN)/python -m eval.demo

demo-smollm2: .venv/installed
	$(BIN)/python -m eval.smollm2.demo

results: .venv/installed
	$(BIN)/python -m eval.results.command

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not vllm" \
		--deselect tests/test_mutants.py::test_no_change_of_meaning_goes_unnoticed

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -m vllm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1" -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e . --group dev
	touch $@

.venv-vllm/installed: pyproject.toml constraints.txt tests/vllm_environment.py
	rm -rf .venv-vllm
	$(PYTHON) tests/vllm_environment.py .venv-vllm
	touch $@

clean:
	rm -rf .venv .venv-vllm runs
