# Two commands: `make demo` shows what fedtune does, `make test` checks that it does it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(BIN)/fedtune simulate

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

# A stamp is newer than what it depends on, so an unchanged install is not repeated.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[simulate]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV)
