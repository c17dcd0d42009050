PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test kernels-check gpu-test gpu-bench lint clean

# The stamp is remade when what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed  ## train a tiny model on generated conversations, and compare with N passes
	$(BIN)/flexmask train --config examples/quickstart.yaml

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2

kernels-check: $(VENV)/.installed  ## compile every kernel configuration ahead of time, for GPUs that need not be here
	$(BIN)/python -m flexmask_kernels.check

# On a machine with a GPU, its own Python and no network: nothing is installed. Most of the time goes into compiling.
GPU_WORKERS ?= 8
GPU := PYTHONPATH=$(CURDIR):$(CURDIR)/build/gpu:$(CURDIR)/tests:$(CURDIR)/benchmarks $(PYTHON)

build/gpu/flexmask_kernels:
	mkdir -p build/gpu && ln -sfn $(CURDIR)/kernels $@

gpu-test: build/gpu/flexmask_kernels  ## the tests that need a GPU, and the kernel tests on it
	$(GPU) -m pytest -n $(GPU_WORKERS) tests/test_cuda.py tests/test_kernels.py tests/test_backends_in_models.py

gpu-bench: build/gpu/flexmask_kernels  ## attention against FlexAttention and SDPA, the tile sizes; into benchmarks/results
	-$(GPU) benchmarks/attention.py gpu
	-$(GPU) benchmarks/kernel_configs.py gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info
