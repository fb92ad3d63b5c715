// Which instruction set runs: chosen once, at run time.
//
// How one source serves every CPU. A kernel family is a header `<family>_kernels.h` and a driver `<family>.cpp`. The
// driver names the header in FUSEDRES_KERNELS and includes foreach_isa.h, which includes it once per instruction set,
// each time in another namespace (baseline, avx2, avx512) and inside a compiler region that turns that set on. The
// driver (checks, allocation, threads) is compiled for the baseline and takes the best kernel as a function pointer.
//
// Why not one file per set with -mavx2: every inline std:: function emitted there would hold AVX code, and the linker
// may keep that copy for all callers, so that an old CPU dies in std::vector. Here std:: and torch headers are included
// before the regions open, and templates carry the options of the place where they were defined.
#pragma once

namespace fusedres::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU, or the lower one that FUSEDRES_CPU_ISA=baseline|avx2|avx512 asks for. Read
// once.
Isa best_isa();

}  // namespace fusedres::cpu

// The instance of a kernel for best_isa(), as a function pointer: FUSEDRES_BEST_ISA(channel_stats_chunk<T>). And that
// for another, which this CPU has: FUSEDRES_OF_ISA(isa, channel_stats_chunk<T>).
#define FUSEDRES_BEST_ISA(...) FUSEDRES_OF_ISA(::fusedres::cpu::best_isa(), __VA_ARGS__)
#if defined(__x86_64__)
#define FUSEDRES_OF_ISA(isa, ...)                              \
  ((isa) == ::fusedres::cpu::Isa::avx512 ? avx512::__VA_ARGS__ \
   : (isa) == ::fusedres::cpu::Isa::avx2 ? avx2::__VA_ARGS__   \
                                         : baseline::__VA_ARGS__)
#else
#define FUSEDRES_OF_ISA(isa, ...) (baseline::__VA_ARGS__)
#endif
