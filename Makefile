# The developer's day. `make run` and `make test` need only Python and a C++ compiler; everything else they install.
#
#   make run              measure this machine: fusedres bench, results under runs/
#   make test             the test suite;  TORCH=2.11.0 with another torch, JOBS=1 processes, PYTEST=... more options
#   make triton           the Triton kernels: tests under the interpreter, then compiled for three architectures
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

.PHONY: run test triton soak gpu lint types clean

run: $(VENV)/.run-$(TORCH_TAG)
	mkdir -p runs
	$(BIN)/fusedres info
	$(BIN)/fusedres bench --arch $(ARCH) --json runs/$(ARCH).json --plot runs/$(ARCH).png

# A process a core, each with one thread: small problems on two threads wait for each other longer than they compute.
RUN_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test: $(VENV)/.test-$(TORCH_TAG)
	$(RUN_TESTS) $(PYTEST)

# Two processes of their own: whether kernels are interpreted or compiled is settled when Triton is imported.
triton: $(VENV)/.test-$(TORCH_TAG)
	TRITON_INTERPRET=1 $(RUN_TESTS) tests/triton $(PYTEST)
	TRITON_INTERPRET=1 $(RUN_TESTS) tests/field -m kernel $(PYTEST)
	$(RUN_TESTS) tests/triton_compile $(PYTEST)

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
$(VENV)/.test-$(TORCH_TAG): EXTRAS := test
$(VENV)/.lint-$(TORCH_TAG): EXTRAS := lint
$(VENV)/.run-$(TORCH_TAG) $(VENV)/.test-$(TORCH_TAG) $(VENV)/.lint-$(TORCH_TAG): $(NATIVE) | $(VENV)/.$(TORCH_TAG)
	$(BIN)/pip install --quiet --no-build-isolation $(if $(TORCH),"torch==$(TORCH)") --editable '.[$(EXTRAS)]'
	touch $@

# Another torch than before makes every other stamp wrong.
$(VENV)/.$(TORCH_TAG): | $(BIN)/pip
	rm -f $(VENV)/.run-* $(VENV)/.test-* $(VENV)/.lint-* $(VENV)/.torch-*
	$(BIN)/pip install --quiet "torch$(if $(TORCH),==$(TORCH))" 'setuptools>=77' wheel ninja
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info fusedres/_native*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
