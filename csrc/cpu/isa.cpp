#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedres::cpu {
namespace {

// __builtin_cpu_supports asks the operating system too: a set whose registers it does not save is not reported.
Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);  // a name not every compiler knows
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen_isa() {
  const Isa detected = detected_isa();
  const char* asked = std::getenv("FUSEDRES_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return detected;
  const std::string name = asked;
  for (const auto& [isa, isa_name] :
       {std::pair{Isa::baseline, "baseline"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}}) {
    if (name != isa_name) continue;
    if (isa <= detected) return isa;
    throw std::runtime_error("FUSEDRES_CPU_ISA=" + name + ": this CPU does not have it");
  }
  throw std::runtime_error("FUSEDRES_CPU_ISA=" + name + ": expected baseline, avx2 or avx512");
}

}  // namespace

Isa best_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace fusedres::cpu
