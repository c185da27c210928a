# Everything lives in .venv; `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard runtime/*.py runtime/*/*.py runtime/*/*/*.py runtime/*/*/*.cu runtime/*/*/*.cuh export/*.py calibration/*.py benchmarks/*.py benchmarks/*.cu)

# where pyproject.toml has NVRTC installed for development
KERNELS := $(if $(filter Linux-x86_64,$(shell uname -s -m | tr ' ' -)),kernels)

.PHONY: demo test lint kernels clean

demo: .venv/installed
	$(BIN)/bar-edge demo -o demo-output --force

# at most 4 processes: each loads PyTorch and makes models of its own
test: .venv/installed lint $(KERNELS)
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: .venv/installed
	$(BIN)/python -m bar_edge.benchmarks.kernels -o build/kernels.json

# torch first and alone: asked for together with others, pip may choose a build with gigabytes of CUDA
.venv/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt '.[bench,export,calibration,dev]'
	$(BIN)/pip uninstall --quiet --yes bar-edge
	touch $@

# strict mode links file by file, which mypy and new files need: installed again whenever a source changes
.venv/installed: .venv/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --config-settings editable_mode=strict -e .
	touch $@

clean:
	rm -rf .venv build *.egg-info demo-output
