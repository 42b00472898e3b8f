# Everything needs only Python 3.11+ and make. The environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench verify docs scoreboard clean

# Trains a teacher on real digits, distils it into a small student, and writes a report.
demo: $(INSTALLED)
	$(BIN)/limbeck demo

# The whole suite, on two workers with one thread each.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m limbeck.report.scoreboard README.md scoreboard --check

# Speed and memory, as ratios within one run.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# make verify NAME=bd-kd, or NAME=--all
verify: $(INSTALLED)
	$(BIN)/limbeck verify $(or $(NAME),--all)

scoreboard: $(INSTALLED)
	$(BIN)/limbeck scoreboard
	$(BIN)/python -m limbeck.report.scoreboard README.md scoreboard

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('limbeck needs Python 3.11 or newer' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist site runs
