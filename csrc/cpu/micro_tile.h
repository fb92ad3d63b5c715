// The shape of a micro-tile. Included by a kernels header, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// The accumulators of (rows, vectors), one row of vectors and a broadcast element fill the registers: 16 of them, 32
// for 64-byte vectors.
constexpr int kMicroRows = FUSEDRES_VECTOR_BYTES == 64 ? 12 : 6, kMicroVectors = 2;

}  // namespace fusedres::cpu::FUSEDRES_ISA
