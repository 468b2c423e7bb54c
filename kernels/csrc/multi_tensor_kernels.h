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

// Fisher = decay Fisher + weight grad^2.
struct Fisher {
  float decay, weight;
};

// What a task owns: where a byte of the mask lies between these two, both included.
struct Owners {
  uint8_t first, last;
};

struct MultiTensorKernels {
  // targets, sources, shadows
  void (*ema)(const Chunk&, const Ema&);
  // params, grads, exp_avgs, exp_avg_sqs, averages, copies, shadows
  void (*adamw)(const Chunk&, const AdamW&);
  // tensors: the sum of their squares, and their product with a number
  double (*squares)(const Chunk&);
  void (*scale)(const Chunk&, float);
  // fishers, grads
  void (*fisher)(const Chunk&, const Fisher&);
  // params, anchors, fishers: the sum of Fisher (param - anchor)^2
  double (*ewc)(const Chunk&);
  // params, anchors, fishers, grads: factor Fisher (param - anchor)
  void (*ewc_grad)(const Chunk&, float factor);
  // tensors, masks
  void (*masks)(const Chunk&, const Owners&);
};

extern const MultiTensorKernels multi_tensor_baseline;
#ifdef MMKERNELS_X86
extern const MultiTensorKernels multi_tensor_avx2;
extern const MultiTensorKernels multi_tensor_avx512;
#endif

}  // namespace mmkernels
