# From a fresh clone, each of these sets up what it needs first:
#   make test                      every test
#   make architectures             every architecture of Transformers, small, against its eager attention: minutes
#   make bench                     speed against torch; OPS=softmax for some ops only
#   make build                     compile what changed
#   make gpu                       on a CUDA GPU: every Triton test, then speed; STAGE=test or bench for one of the two;
#                                  OUT=folder for tests.xml, report.json and report.md
#   make lint                      ruff, mypy, clang-format; `make format` repairs what it can
#   make asan                      one instruction set under AddressSanitizer and UBSan, and wrong calls of all operators
#   make tsan                      the kernels' own synchronisation under ThreadSanitizer
#   make clean                     remove .venv and what was built
# PYTHON=python3.12 makes .venv with another interpreter; VENV= PYTHON=... uses that interpreter as it is.
PYTHON ?= python3
VENV   ?= .venv
OPS    ?=
STAGE  ?= test bench
OUT    ?= build/gpu
CALLS  ?= 20000

PY    := $(if $(VENV),$(VENV)/bin/$(notdir $(PYTHON)),$(PYTHON))
BIN   := $(if $(VENV),$(VENV)/bin/)
STAMP := $(or $(VENV),build)/installed
CPP   := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu csrc/cuda/tile/*.h tests/*.cpp tests/cuda/*.cpp tests/cuda/*.h)

.PHONY: help test architectures bench gpu build lint format asan tsan clean
help:
	@sed -n '1,/^$$/s/^# *//p' Makefile

# Spread over processes, each with its share of the cores: tests/conftest.py.
test: build
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

architectures: build
	$(PY) -m pytest -q -m architectures tests/test_architectures.py

bench: build
	$(PY) -m mmkern.cli bench $(if $(OPS),--ops $(OPS))

# Without a virtual environment, the interpreter's own packages are used and nothing is fetched. The tests compile some
# hundred kernels: on as many processes as pytest-xdist, if it is there, may start.
gpu: $(if $(VENV),$(STAMP))
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@mkdir -p $(OUT)
	$(if $(filter test,$(STAGE)),$(PY) -m pytest -q --junitxml=$(OUT)/tests.xml $$($(PY) -c 'import xdist; print("-n 8")' 2>/dev/null) tests/test_triton_*.py tests/cuda/test_softmax.py)
	$(if $(filter bench,$(STAGE)),$(PY) -m mmkern.cli bench --device cuda --output $(OUT))

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

# In a folder of its own: a copy of the sources, whose setup.py compiles AVX2 alone, under sanitizers. Torch is not
# compiled so: its allocations are watched, its own reads and writes are not.
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -DMMKERN_ONE_ISA
asan: build
	@mkdir -p build/asan
	cp -pu --parents $$(git ls-files pyproject.toml README.md csrc kernels benchmarks mmkern tests/operator_calls.py) build/asan
	sed 's/-O3/-O1/; s/^if platform.machine.*/if False:/; s/^ISAS = .*/ISAS = {"baseline": AVX2}/' setup.py > build/asan/setup.py
	cd build/asan && CXX="$(CXX) $(ASAN)" $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/asan && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 PYTHONPATH=. \
	  sh -c '$(abspath $(PY)) tests/operator_calls.py 0 0 $(CALLS) && $(abspath $(PY)) tests/operator_calls.py 1 0 $(CALLS) --guard' > calls.txt
	@tail -1 build/asan/calls.txt

tsan:
	@mkdir -p build/tsan
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -Icsrc tests/turns_race.cpp -o build/tsan/turns_race -pthread
	build/tsan/turns_race
	! build/tsan/turns_race race 2> /dev/null > /dev/null

clean:
	rm -rf build $(VENV) *.egg-info .*_cache .hypothesis mmkern/*.so

# torch first and pinned: another package's dependency on it would take the newest. Then the build tools,
# and the extension on its own, so that its progress shows; pip finds it compiled.
$(STAMP): pyproject.toml constraints.txt $(if $(VENV),$(PY))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmkern: needs Python >= 3.11, got " + sys.version)'
	$(PY) -m pip install -c constraints.txt torch==2.13.0
	$(PY) -m pip install -c constraints.txt setuptools pybind11 ninja
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[bench,train,glove,transformers,dev]'
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmkern: needs Python >= 3.11, got " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
