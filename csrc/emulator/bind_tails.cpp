// Bindings of the training tails and of bn_finalize.
#include "emulator/bindings.h"

namespace fusedres::emulator {

void bind_tails(pybind11::module_& /*module*/) {}

}  // namespace fusedres::emulator
