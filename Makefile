# make demo    environment, install, and the main job: a ViT trained one block at a time, beside end to end
# make test    environment, install, all tests
#
# With a CUDA build of torch already in PYTHON's packages, keep it:
#   make demo PYTHON=python3 VENV_FLAGS=--system-site-packages CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
PYTEST_FLAGS ?= -n 2 -q
RUN_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PINNED := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)

.PHONY: demo test check clean

# torch and the build tools go in first, and the package is built against them: an isolated build would fetch torch again.
$(VENV)/.ready: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) install $(PINNED) $(TORCH) "setuptools>=77" wheel ninja packaging
	touch $@

# --editable: Python edits need no reinstall; C++ edits rebuild, since the sources are listed above.
$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install $(PINNED) --no-build-isolation --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install $(PINNED) --no-build-isolation --editable ".[test]"
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/dblocks train vit-digits $(RUN_FLAGS)

test: $(VENV)/.tested
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info dbkernels/*.so
