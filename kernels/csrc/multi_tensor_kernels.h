// The work on a chunk of lists of tensors, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

// Dtypes of a list: three bits of a tensor's kind, the first list's the lowest.
enum Dtype : int64_t { NONE, FLOAT, HALF, BFLOAT, BYTE };

constexpr int MAX_LISTS = 7;

// The same elements of the n-th tensor of each list.
struct Chunk {
  int64_t elements, kind, number, first;
  void* lists[MAX_LISTS];
};

// target + weight (source - target), and a copy; rounded stochastically by the bits of a key.
struct Ema {
  float weight;
  bool stochastic;
  uint64_t key;
};

// What a step of AdamW makes of its settings: param *= keep, m += rise (grad - m), v = beta2 v + fall grad^2,
// param -= step m / (root sqrt(v) + eps), and then between low and high.
struct AdamW {
  float keep, rise, beta2, fall, step, root, eps, low, high, weight;
};

struct MultiTensorKernels {
  // targets, sources, shadows
  void (*ema)(const Chunk&, const Ema&);
  // params, grads, exp_avgs, exp_avg_sqs, averages, copies, shadows
  void (*adamw)(const Chunk&, const AdamW&);
};

extern const MultiTensorKernels multi_tensor_baseline;
#ifdef MMKERNELS_X86
extern const MultiTensorKernels multi_tensor_avx2;
extern const MultiTensorKernels multi_tensor_avx512;
#endif

}  // namespace mmkernels
