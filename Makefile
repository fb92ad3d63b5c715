# The developer's day. `make run` and `make test` need only Python and a C++ compiler; everything else they install.
#
#   make run              measure this machine: fusedres bench, results under runs/
#   make bench            this machine against every peer it can run: JSON, page and plots under bench/results/
#   make test             the test suite;  TORCH=2.11.0 with another torch, JOBS=1 processes, PYTEST=... more options
#   make triton           the Triton kernels: tests under the interpreter, then compiled for every architecture
#   make torches          the oldest torch that is served and the newest: test suites, native libraries swapped between them
#   make dist-check       archives built and installed into clean environments: no compiler, no torch, another CUDA
#   make soak             the long runs: random problems, fuzzing under sanitizers, memory, planted faults (an hour)
#   make gpu              on a machine with a GPU: the kernels' tests on it, compute-sanitizer, benchmarks
#   make lint types       formatting, lint and types
#   make clean            remove everything these targets made

PYTHON ?= python3
TORCH  ?=
ARCH   ?= resnet50
PYTEST ?=
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

VENV   := .venv
BIN    := $(VENV)/bin
TORCH_TAG := torch-$(or $(TORCH),newest)
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run bench test triton torches dist-check soak gpu lint types clean

run: $(VENV)/.run-$(TORCH_TAG)
	mkdir -p runs
	$(BIN)/fusedres info
	$(BIN)/fusedres bench --arch $(ARCH) --json runs/$(ARCH).json --plot runs/$(ARCH).png

# Peers that are not on PyPI, or that pin another torch, take part where they were installed by hand.
NETWORKS ?= resnet18 resnet50 resnet101
ROUNDS   ?= 10
bench: $(VENV)/.bench-$(TORCH_TAG)
	$(BIN)/fusedres bench --arch $(NETWORKS) --rounds $(ROUNDS) --peers --bounds --scaling --results bench/results

# A process a core, each with one thread: small problems on two threads wait for each other longer than they compute.
RUN_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test: $(VENV)/.test-$(TORCH_TAG)
	$(RUN_TESTS) $(PYTEST)

# Two processes of their own: whether kernels are interpreted or compiled is settled when Triton is imported.
triton: $(VENV)/.test-$(TORCH_TAG)
	TRITON_INTERPRET=1 $(RUN_TESTS) tests/triton $(PYTEST)
	TRITON_INTERPRET=1 $(RUN_TESTS) tests/field -m kernel $(PYTEST)
	$(RUN_TESTS) tests/triton_compile $(PYTEST)

# Each torch in an environment of its own. The library lies in the checkout: whoever built it last is tested with both.
OLDEST := 2.11.0
BUILD_NATIVE = FUSEDRES_REQUIRE_NATIVE=1 $(1)/bin/python setup.py -q build_ext --inplace --force
TEST_NATIVE  = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest --numprocesses $(JOBS) $(wildcard tests/test_native*.py) $(PYTEST)
torches:
	$(MAKE) VENV=.venv-newest .venv-newest/.test-torch-newest
	$(MAKE) VENV=.venv-oldest TORCH=$(OLDEST) test triton
	$(call BUILD_NATIVE,.venv-oldest)
	$(call TEST_NATIVE,.venv-newest)
	$(call BUILD_NATIVE,.venv-newest)
	$(call TEST_NATIVE,.venv-oldest)
	$(MAKE) VENV=.venv-newest test

dist-check: $(VENV)/.test-$(TORCH_TAG)
	$(BIN)/python -m pytest tests/archives $(PYTEST)

# PARTS=memory runs just that; docs/reliability.md is written of the last results of each.
PARTS ?=
soak: $(VENV)/.test-$(TORCH_TAG)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/run.py $(PARTS)

# Takes the environment it is given where GPU=python-of-it says so: nothing is installed then, nothing downloaded.
GPU ?=
gpu: $(if $(GPU),,$(VENV)/.test-$(TORCH_TAG))
	PYTHON=$(or $(GPU),$(BIN)/python) bench/gpu.sh

lint: $(VENV)/.lint-$(TORCH_TAG)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs -r $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.lint-$(TORCH_TAG)
	$(BIN)/mypy

# One stamp for each set of extras. Torch comes first and the build uses it, so that it is downloaded once.
$(VENV)/.run-$(TORCH_TAG):  EXTRAS := cli,train
$(VENV)/.bench-$(TORCH_TAG): EXTRAS := $(if $(shell command -v nvidia-smi),bench-gpu,bench)
$(VENV)/.test-$(TORCH_TAG): EXTRAS := test
$(VENV)/.lint-$(TORCH_TAG): EXTRAS := lint
$(VENV)/.run-$(TORCH_TAG) $(VENV)/.bench-$(TORCH_TAG) $(VENV)/.test-$(TORCH_TAG) $(VENV)/.lint-$(TORCH_TAG): $(NATIVE) | $(VENV)/.$(TORCH_TAG)
	$(BIN)/pip install --quiet --no-build-isolation $(if $(TORCH),"torch==$(TORCH)") --editable '.[$(EXTRAS)]'
	touch $@

# Another torch than before makes every other stamp wrong. The interpreter of older Tritons fails with NumPy 2.4.
$(VENV)/.$(TORCH_TAG): | $(BIN)/pip
	rm -f $(VENV)/.run-* $(VENV)/.bench-* $(VENV)/.test-* $(VENV)/.lint-* $(VENV)/.torch-*
	$(BIN)/pip install --quiet "torch$(if $(TORCH),==$(TORCH))" $(if $(TORCH),'numpy<2.4') 'setuptools>=77' wheel ninja
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv* build dist *.egg-info fusedres/_native*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
