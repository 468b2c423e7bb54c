// What the native ops share: the instruction set, and how much a thread is worth.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace mmkernels {

// below this many entries a thread costs more than it saves
constexpr int64_t GRAIN = 32768;

#ifdef MMKERNELS_X86
// The kernels for the best instruction set of this machine, or a lesser one that ATEN_CPU_CAPABILITY names, as for
// torch.
template <class Kernels>
const Kernels& pick(const Kernels& avx512, const Kernels& avx2, const Kernels& baseline) {
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = named ? named : "";
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && most != "avx2" && most != "default") return avx512;
  if (fma && most != "default") return avx2;
  return baseline;
}
#endif

}  // namespace mmkernels
