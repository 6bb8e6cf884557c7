# make demo: from a clone to a pruned network that is measured.   make test: set-up, lint, types, tests.
# TORCH says where torch comes from: a pip requirement, or empty to keep the one of the base interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
VENV_FLAGS := $(if $(TORCH),,--system-site-packages)
# A torch that is there is not exchanged for the one that a newer package would like.
CONSTRAINTS := -c $(if $(TORCH),constraints.txt,$(VENV)/own-torch.txt)
# Two tests at a time; threads that wait for work do not take the other's core.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all lint build clean

demo: build
	$(BIN)/vpns run runs/demo

# GPU kernels are run in a process of their own: by a GPU, or without one by Triton's interpreter.
test: build lint
	$(PYTEST) -m "not long"
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" tests/gpu

test-all: build lint
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/gpu

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),,$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/own-torch.txt)
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) $(TORCH) numpy pybind11 cmake ninja setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf build $(VENV) vpns_kernels/*.so
