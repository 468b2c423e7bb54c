// The work on a chunk of lists of tensors, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

// Dtypes of a list: two bits of a chunk's kind, the first list's the lowest.
enum Dtype : int64_t { NONE, FLOAT, HALF, BFLOAT };

struct Ema {
  int64_t elements, kind;
  void* target;
  const void* source;
  void* shadow;
  float weight;
  // of stochastic rounding
  bool stochastic;
  uint32_t number;
  int64_t first;
  uint64_t key;
};

struct MultiTensorKernels {
  // target + weight (source - target), and a copy of it.
  void (*ema)(const Ema&);
};

extern const MultiTensorKernels multi_tensor_baseline;
#ifdef MMKERNELS_X86
extern const MultiTensorKernels multi_tensor_avx2;
extern const MultiTensorKernels multi_tensor_avx512;
#endif

}  // namespace mmkernels
