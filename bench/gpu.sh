#!/usr/bin/env bash
# Everything that needs a GPU: the kernels' tests on the device, under compute-sanitizer where it is there, benchmarks.
# PYTHON names the interpreter of an environment that has torch, triton, torchvision, setuptools, pytest and xdist; this
# package is built into it, without network. Exits 2 where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

step() { printf '\n=== %s (after %d s)\n' "$1" "$SECONDS"; }

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu: there is no GPU here, or this torch cannot use it; nothing was run" >&2
  exit 2
fi
unset TRITON_INTERPRET

step "build"
"$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
step "what is here"
"$PYTHON" -m fusedres info
step "kernels on the device"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q --numprocesses "$(nproc)" --dist worksteal tests/gpu tests/triton
if command -v compute-sanitizer > /dev/null; then
  step "kernels under compute-sanitizer"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 --target-processes all \
    "$PYTHON" -m pytest -q -x tests/gpu -k "not network"
else
  echo "compute-sanitizer is not on PATH: left out"
fi
step "networks"
"$PYTHON" bench/gpu.py "$@"
step "tiles: pointers, tensor descriptors, persistent programs"
"$PYTHON" bench/tiles.py --forms conv_fprop:eval+residual "conv_dgrad:plain residual" --seconds 240
step "done"
