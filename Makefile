# Everything makes its own environment first: Python 3.11 (or newer) and make are all it takes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help chat train bots test lint prove-deploy clean

help:            ## what there is to do
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.model: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[model]'
	@touch $@

$(VENV)/.bots: $(VENV)/.model
	$(BIN)/pip install --quiet --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.model
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

chat: $(VENV)/.model    ## talk to the fish in this terminal
	@$(BIN)/guppy chat

train: $(VENV)/.model   ## train a fish of your own
	$(BIN)/guppy train

bots: $(VENV)/.bots     ## run the bots whose tokens stand in .env
	$(BIN)/python -m bot all

test: $(VENV)/.dev      ## every test, a real Redis included
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev      ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prove-deploy:    ## build the images and prove the whole stack, on any machine with Docker
	docker/prove.sh

clean:           ## remove the environment and what the tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
