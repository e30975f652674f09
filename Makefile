# make demo    install into .venv and run the OCR example: no PyTorch, a few minutes
# make test    install PyTorch and the tools as well, run the quick tests
# make slow    run the tests that take long
# make device-test   run artifacts on an emulated 64-bit ARM (needs qemu-user, g++-aarch64-linux-gnu, a network once)
# make gpu-test     check kernels for GPUs: on an emulated one, and all of them by nvcc
# make lint    ruff (rules and format) and the layering contracts
# make types   mypy
# make venv    only install, what `make test` does
# make clean   remove caches and build products; `make distclean` removes .venv too
#
# Variables: PYTHON=python3.12 (for a new .venv), VENV=folder, TORCH="torch==...", PYTEST_ARGS=..., DEMO_ARGS=...

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEMO_STAMP := $(VENV)/.onnxcomp-demo
TORCH_STAMP := $(VENV)/.onnxcomp-torch
TEST_STAMP := $(VENV)/.onnxcomp-test

# What an editable install does not pick up by itself.
INPUTS := pyproject.toml constraints.txt $(wildcard onnxcomp/native/CMakeLists.txt onnxcomp/native/*.cpp \
	onnxcomp/native/*.h onnxcomp/native/*.map onnxcomp/native/kernels/*.h)

# Shell code before an install: without a working C++17 compiler the kernels are left out, and ops run by their bodies.
# Asks the compilers that CMake would take, in its order.
WITHOUT_COMPILER = found=; \
	for compiler in $$CXX c++ g++ clang++; do \
		if echo 'int main() { return 0; }' | "$$compiler" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then found=1; break; fi; \
	done; \
	if [ -z "$$found" ] && [ -z "$$ONNXCOMP_NO_NATIVE" ]; then \
		echo "==> no C++ compiler found: installing without native kernels (ONNXCOMP_NO_NATIVE=1)"; \
		export ONNXCOMP_NO_NATIVE=1; \
	fi

.PHONY: help demo test slow device-test gpu-test lint types venv clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(DEMO_STAMP)
	@echo "==> running the OCR example"
	$(PY) -m examples.ocr.demo $(DEMO_ARGS)

test: $(TEST_STAMP)
	@echo "==> running the tests"
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

slow: $(TEST_STAMP)
	@echo "==> running the slow tests"
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

device-test: $(TEST_STAMP)
	@echo "==> running artifacts on an emulated aarch64: outputs only, no timing"
	$(PY) -m pytest -m slow tests/device $(PYTEST_ARGS)

gpu-test: $(TEST_STAMP)
	@echo "==> testing kernels for GPUs"
	$(PY) -m pytest -m "slow or not slow" tests/targets/tvm/gpu tests/targets/tvm/test_cuda_emulator.py $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(TEST_STAMP)
	$(PY) -m mypy

venv: $(TEST_STAMP)

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no '$(PYTHON)'. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "onnxcomp needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "This Python has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version 2>&1)"
	@"$(PYTHON)" -m venv "$(VENV)"

# The two installs are editable and share one environment, in any order.
$(DEMO_STAMP): $(INPUTS) | $(PY)
	@echo "==> installing onnxcomp for the example"
	@$(WITHOUT_COMPILER); $(PIP) install -c constraints.txt -e '.[plot]' Pillow
	@touch $@

# On its own and first: it is by far the largest, and nothing else may pull in another build of it.
$(TORCH_STAMP): constraints.txt | $(PY)
	@echo "==> installing PyTorch (large; this takes a while)"
	@$(PIP) install -c constraints.txt '$(TORCH)'
	@touch $@

$(TEST_STAMP): $(INPUTS) $(TORCH_STAMP) | $(PY)
	@echo "==> installing onnxcomp with the test tools"
	@$(WITHOUT_COMPILER); $(PIP) install -c constraints.txt -e '.[test,tvm]'
	@touch $@

clean:
	rm -rf build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
	rm -f onnxcomp/passes onnxcomp/targets
