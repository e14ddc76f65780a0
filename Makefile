# Two commands, each doing all its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/python -m engine.demo --output runs/demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest bench

# torch comes first, pinned: the others would pull a release of gigabytes. The extension builds against it.
$(STAMP): requirements.txt constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "PiTe Engine needs Python 3.11 to 3.13; $$($(PYTHON) --version) was found. Set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info kernels/_C*.so runs
