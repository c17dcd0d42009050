PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test kernels-check lint clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info
