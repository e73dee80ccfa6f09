# make demo    environment, install, and the main job: a ViT trained one block at a time, beside end to end
# make test    environment, install, all tests
# make test-triton36    the Triton kernels' tests with the oldest Triton that is supported
# make test-without-library   the CPU kernels' tests again as after an install without a C++ compiler
# make docs             the documentation's site, in build/site; any warning is an error
# make sanitize         the C++ kernels under the address sanitizer, by random cases (FUZZ_SECONDS=3600 for long)
#
# With a CUDA build of torch already in PYTHON's packages, keep it:
#   make demo PYTHON=python3 VENV_FLAGS=--system-site-packages CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
# Each worker begins with half of the tests as they stand, so what a file sets up is set up once.
PYTEST_FLAGS ?= -n 2 --dist worksteal -q
RUN_FLAGS ?=
OLD_TRITON ?= 3.6.0
FUZZ_SECONDS ?= 60

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PINNED := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
OLD_TRITON_AT := $(VENV)/triton-$(OLD_TRITON)
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)

.PHONY: demo test test-triton36 test-without-library docs sanitize check clean

# torch and the build tools go in first, and the package is built against them: an isolated build would fetch torch again.
$(VENV)/.ready: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) install $(PINNED) $(TORCH) "setuptools>=77" wheel ninja packaging pybind11
	touch $@

# --editable: Python edits need no reinstall; C++ edits rebuild, since the sources are listed above.
$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install $(PINNED) --no-build-isolation --editable ".[experiments]"
	touch $@

$(VENV)/.tested: $(VENV)/.ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install $(PINNED) --no-build-isolation --editable ".[test]"
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/dblocks train vit-digits $(RUN_FLAGS)

test: $(VENV)/.tested
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_FLAGS)

# Beside the environment's Triton, before it on the path. Unpacked aside, so that an interrupted download leaves nothing.
$(OLD_TRITON_AT): $(VENV)/.ready
	rm -rf $@ $@.part
	$(PIP) install --quiet --no-deps --target $@.part triton==$(OLD_TRITON)
	mv $@.part $@
	touch $@

# One in eleven of each test's parameter sets, and of the cases that interpreted scripts go through: eleven has no factor in
# common with their numbers of types and architectures, so all of these come.
test-triton36: $(VENV)/.tested $(OLD_TRITON_AT)
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(abspath $(OLD_TRITON_AT))" TRITON_WANTED=$(OLD_TRITON) \
		$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not gpu" --thin 11 tests/kernels/*triton*.py tests/kernels/test_launch.py

# README promises an install without a compiler. Kernels that need one, or Triton, are left out; one in eleven as above.
test-without-library: $(VENV)/.tested
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_FLAGS) --without-library -m "not gpu" --thin 11 \
		-k "not triton and not cuda and not launch" tests/kernels

# The API reference is made from docstrings without importing the package. The variable silences an advertisement.
docs: $(VENV)/.tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

# Built aside: the library in place stays as it is. Python itself isn't sanitized, so the runtime is loaded before it.
sanitize: $(VENV)/.tested
	CFLAGS="-fsanitize=address -fno-omit-frame-pointer -g1" LDFLAGS="-fsanitize=address" \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py build --build-base build/sanitize
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH="$$(echo $(CURDIR)/build/sanitize/lib*)" \
		$(BIN)/python tests/kernels/fuzz.py --seconds $(FUZZ_SECONDS)

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info dbkernels/*.so
