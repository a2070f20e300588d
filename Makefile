# Everything from a fresh clone: `make test`, `make bench`. Both set up what they need first.
#   make PYTHON=python3.12 ...     another interpreter for .venv
#   make PYTHON=... VENV= ...      that interpreter's own environment, no .venv
#   make bench OPS=softmax         some ops only
PYTHON ?= python3
VENV   ?= .venv
OPS    ?=

PY    := $(if $(VENV),$(VENV)/bin/$(notdir $(PYTHON)),$(PYTHON))
BIN   := $(if $(VENV),$(VENV)/bin/)
STAMP := $(or $(VENV),build)/installed
CPP   := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: help test bench build lint format clean
help:
	@sed -n 's/^#  *//p' Makefile

test: build
	$(PY) -m pytest

bench: build
	$(PY) -m mmkern.cli bench $(if $(OPS),--ops $(OPS))

# Ninja compiles what changed; prints nothing to do otherwise.
build: $(STAMP)
	$(PY) setup.py -q build_ext --inplace

lint: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(BIN)clang-format -i $(CPP)

clean:
	rm -rf build $(VENV) *.egg-info .*_cache .hypothesis mmkern/*.so

# torch first and pinned: another package's dependency on it would take the newest. Then the build tools,
# and the extension on its own, so that its progress shows; pip finds it compiled.
$(STAMP): pyproject.toml constraints.txt $(if $(VENV),$(PY))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmkern: needs Python >= 3.11, got " + sys.version)'
	$(PY) -m pip install -c constraints.txt torch==2.13.0
	$(PY) -m pip install -c constraints.txt setuptools pybind11 ninja
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[bench,transformers,dev]'
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmkern: needs Python >= 3.11, got " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
