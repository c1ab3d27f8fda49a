# make train      install and run the main job: a language model, trained in three ways
# make examples   install and train on digits: a GAN with two wrappers, a net from configs
# make test       install, then lint, types, doctests, tests and property tests
# make test-hosts install, then train inside Accelerate, Lightning, MMEngine and transformers
# make mutants    install, then break one formula at a time and see that the tests notice
# make laws       write docs/laws.md from a run of every law on every transform
# make bench      install, run the benchmark suite and write docs/benchmarks.md from it; then the smaller ones
#
# Each works on a fresh machine with Python 3.10 to 3.13 and nothing else.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: train examples test test-hosts test-thorough mutants laws lint bench clean

train: $(VENV)/examples.installed
	$(BIN)/python examples/train_language_model.py $(ARGS)

examples: $(VENV)/examples.installed
	$(BIN)/python examples/from_config.py
	$(BIN)/python examples/gan.py

test: lint
	$(BIN)/python -m pytest --quiet -n auto --doctest-modules functional_optim tests property_tests

test-hosts: $(VENV)/hosts.installed
	$(BIN)/python -m pytest --quiet host_tests

test-thorough: lint
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest --quiet -n auto property_tests

mutants: $(VENV)/dev.installed
	$(BIN)/python tests/mutate.py $(ARGS)

laws: $(VENV)/dev.installed
	$(BIN)/python -m pytest --quiet property_tests/test_laws.py --write-laws-table \
		--deselect property_tests/test_laws.py::test_table_is_current

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict examples/own_rule.py
	$(BIN)/pyright --pythonpath $(BIN)/python examples/own_rule.py

bench: $(VENV)/bench.installed
	$(BIN)/python benchmarks/suite.py --out benchmarks/results $(ARGS)
	$(BIN)/python benchmarks/suite_page.py
	$(BIN)/python benchmarks/update_step.py --out benchmarks/results
	$(BIN)/python benchmarks/optimizer_step.py --out benchmarks/results
	$(BIN)/python benchmarks/wrapper_overhead.py --out benchmarks/results

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[examples]'
	touch $@

$(VENV)/dev.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test,dev,examples]'
	touch $@

$(VENV)/bench.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[bench]'
	touch $@

$(VENV)/hosts.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test,hosts]'
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
