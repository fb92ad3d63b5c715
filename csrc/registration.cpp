// The native library's implementations. Their schemas are Python's: fusedres/native.py.
#include <torch/csrc/stable/library.h>

#include "cpu/fingerprint.h"

STABLE_TORCH_LIBRARY_IMPL(fusedres_cpu, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fusedres::cpu::fingerprint)); }
