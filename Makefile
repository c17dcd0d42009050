PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# OpenMP's threads spin while they wait, which on a busy machine takes the time of those that work (benchmarks/LOG.md).
export OMP_WAIT_POLICY ?= PASSIVE
# A hundred tests start a process, and importing everything takes seconds where bytecode is kept, and three times that without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test kernels-check gpu-test gpu-bench lint clean

# The stamp is remade when what is to be installed changes. Modules are compiled when they are imported: most never are.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed  ## train a tiny model on generated conversations, and compare with N passes
	$(BIN)/flexmask train --config examples/quickstart.yaml

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

kernels-check: $(VENV)/.installed  ## compile every kernel configuration ahead of time, for GPUs that need not be here
	$(BIN)/python -m flexmask_kernels.check
	$(BIN)/python tests/fla_ahead.py
	$(BIN)/python tests/flash_ahead.py

# On a machine with a GPU, its own Python and no network: nothing is installed. Most of the time goes into compiling.
GPU_WORKERS ?= 15
GPU := PYTHONPATH=$(CURDIR):$(CURDIR)/build/gpu:$(CURDIR)/tests:$(CURDIR)/benchmarks

build/gpu/flexmask_kernels:
	mkdir -p build/gpu && ln -sfn $(CURDIR)/kernels $@

gpu-test: build/gpu/flexmask_kernels  ## the tests that need a GPU, and the kernel tests on it
	$(GPU) TORCHINDUCTOR_COMPILE_THREADS=1 $(PYTHON) -m pytest -n $(GPU_WORKERS) --dist worksteal -k "not beyond_32_bits" \
	  tests/test_cuda.py tests/test_kernels.py tests/test_flash.py tests/test_backends_in_models.py
	$(GPU) $(PYTHON) -m pytest tests/test_cuda.py -k beyond_32_bits  # 45 GiB, which no other test should have to share

# Each benchmark has so many seconds, eight minutes together; what it has by then is in benchmarks/results.
gpu-bench: build/gpu/flexmask_kernels  ## the GPU sizes of the benchmarks: JSON and pictures into benchmarks/results
	failed=; for run in "attention gpu 60" "npass gpu 80" "npass gpu_hybrid 40" "recurrence gpu 30" "npass gpu_agent 60" \
	  "npass gpu_mathchat 50" "memory gpu 40" "loss_memory gpu 15" "kernel_configs gpu 25" "attention gpu_more 35" "growth gpu 25" "groups gpu 20"; do set -- $$run; \
	  $(GPU) timeout -k 10 -s INT $$3 $(PYTHON) benchmarks/$$1.py $$2 || test $$? -eq 124 || failed="$$failed $$1:$$2"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info
