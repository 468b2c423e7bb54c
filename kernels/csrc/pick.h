// What the native ops share: the instruction set, and how much a thread is worth.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace mmkernels {

// below this many entries a thread costs more than it saves
constexpr int64_t GRAIN = 32768;

#ifdef MMKERNELS_X86
// The lesser instruction set that ATEN_CPU_CAPABILITY names, as for torch.
inline std::string_view named_capability() {
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  return named ? named : "";
}

inline bool has_avx512_bf16() {
  const std::string_view most = named_capability();
  return most != "avx2" && most != "default" && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512bw");
}

// The kernels for the best instruction set of this machine, or for the lesser one that is named.
template <class Kernels>
const Kernels& pick(const Kernels& avx512, const Kernels& avx2, const Kernels& baseline) {
  const std::string_view most = named_capability();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && most != "avx2" && most != "default") return avx512;
  if (fma && most != "default") return avx2;
  return baseline;
}
#endif

}  // namespace mmkernels
