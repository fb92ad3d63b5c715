// Includes the header named by FUSEDRES_KERNELS once per instruction set (isa.h says why). Once in a source file, after
// every std:: and torch header; the kernels header has no include guard and lives in fusedres::cpu::FUSEDRES_ISA.
//
//   #define FUSEDRES_KERNELS "cpu/channel_stats_kernels.h"
//   #include "cpu/foreach_isa.h"
#ifdef FUSEDRES_ISA
#error "foreach_isa.h was included twice in one source file"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/dtypes.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // undefined operands in GCC's AVX-512 intrinsics
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDRES_ISA avx2
#define FUSEDRES_VECTOR_BYTES 32
#include "cpu/simd.h"
#include FUSEDRES_KERNELS
#undef FUSEDRES_ISA
#undef FUSEDRES_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FUSEDRES_ISA avx512
#define FUSEDRES_VECTOR_BYTES 64
#include "cpu/simd.h"
#include FUSEDRES_KERNELS
#undef FUSEDRES_ISA
#undef FUSEDRES_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

#define FUSEDRES_ISA baseline
#define FUSEDRES_VECTOR_BYTES 16
#include "cpu/simd.h"
#include FUSEDRES_KERNELS
