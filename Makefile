# Everything happens in .venv, which the first target that needs it makes. PYTHON=/path/to/python chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# distributions that the tests of the registry use as third-party plug-ins
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard tests/plugins/*/pyproject.toml))
# two test processes of one thread each are faster than two threads that wait for each other
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# files stay together: the tests of one share what they build
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile
SUITE := $(PYTEST) -m "not slow and not gpu and not reference" tests srcflow
# the kernels that PyTorch, oneDNN and MKL choose where there is AVX2 and nothing newer; and PyTorch's for any x86-64 processor
AVX2_ONLY := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
NO_VECTORS := ATEN_CPU_CAPABILITY=default

.PHONY: help install demo test test-portable test-slow lint types docs bench soak clean

help:
	@echo "make install        .venv with the package, editable, and everything below needs"
	@echo "make demo           the whole pipeline on Fashion-MNIST: results in runs/demo"
	@echo "make test           lint, types and the tests"
	@echo "make test-portable  the tests with the kernels of older processors: AVX2 only, then PyTorch without vector instructions"
	@echo "make test-slow      tests that take minutes, comparisons with transformers and diffusers, and those for a GPU where there is one"
	@echo "make lint           ruff and import-linter"
	@echo "make types          mypy --strict"
	@echo "make docs           the documentation, in site/"
	@echo "make bench          speed of the parts"
	@echo "make soak           30 minutes of training under random kills: the weights of an undisturbed run, bit for bit"
	@echo "make clean          remove caches and what was built; .venv and runs/ stay"

install: $(VENV)/.dev $(VENV)/.docs

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: lint types
	$(SUITE)

test-portable: $(VENV)/.dev
	@status=0; for kernels in "$(AVX2_ONLY)" "$(NO_VECTORS)"; do \
		echo "$$kernels"; env $$kernels $(SUITE) || status=1; done; exit $$status

test-slow: $(VENV)/.reference
	$(PYTEST) -m "slow or gpu or reference" tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy --strict srcflow

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev
	$(BIN)/python tools/bench.py

soak: $(VENV)/.dev
	$(BIN)/python tools/soak.py

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find srcflow tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what is installed: one stamp per set of extras, made anew when pyproject.toml changes -------------------------------------------

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "error: no Python of version 3.10 or later was found; set PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make a virtual environment. It lacks venv or ensurepip: on Debian and Ubuntu" \
		"'apt install python3-venv', or set PYTHON=/path/to/another/python" >&2; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.python
	@echo "Installing srcflow[demo] into $(VENV); torch is large, so the first time takes minutes"
	@$(PIP) --editable ".[demo]"
	@touch $@

# Holds the demo's extra as well, since tests compare with its weights. The test distributions go beside the environment's packages
# (tests/conftest.py finds them there), so that the broken one is not reported to whoever runs the demo afterwards.
$(VENV)/.dev: pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS)) $(wildcard tests/plugins/*/*/*.py) | $(VENV)/.python
	@echo "Installing srcflow[dev,demo,fid] into $(VENV); torch is large, so the first time takes minutes"
	@$(PIP) --editable ".[dev,demo,fid]"
	@$(if $(PLUGINS),$(PIP) --no-deps --upgrade --target $(VENV)/plugins $(addprefix ./,$(PLUGINS)))
	@touch $(VENV)/.demo $@

$(VENV)/.reference: pyproject.toml | $(VENV)/.dev
	@echo "Installing srcflow[reference] into $(VENV)"
	@$(PIP) --editable ".[reference]"
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.python
	@echo "Installing srcflow[docs] into $(VENV)"
	@$(PIP) --editable ".[docs]"
	@touch $@
