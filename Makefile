PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export POT_BACKEND_DISABLE_PYTORCH := 1

.PHONY: demo test bench lint types zoo clean setup

# torch goes first, on its own: a range would be answered with gigabytes of CUDA on machines without a GPU.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	HF_HUB_OFFLINE= $(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,llm,dev]'
	touch $@

setup: $(VENV)/.ready

demo: $(VENV)/.ready
	$(BIN)/transfer run transfer/presets/demo.yaml

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2

# Peers that are compared with where they install.
$(VENV)/.bench: $(VENV)/.ready
	-HF_HUB_OFFLINE= $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks.run

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/pyright

zoo: $(VENV)/.ready
	$(BIN)/transfer zoo train

clean:
	rm -rf runs $(VENV) .pytest_cache .ruff_cache
