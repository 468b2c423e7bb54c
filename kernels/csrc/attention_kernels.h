// Attention of one head, a block of rows at a time, compiled once for each instruction set.
//
// Rows lie side by side in the lanes: a tile of logits is [keys, lanes] and a result [head dimensions, lanes]. So keys and
// values are read where they are, only the block's own rows are transposed, and a softmax is a sum of vectors.
#pragma once

#include <cstdint>

namespace mmkernels {

// Vectors of lanes in a block of rows, and keys of a tile: 16 KiB of float32 under AVX-512.
constexpr int64_t LANE_VECTORS = 4;
constexpr int64_t TILE_KEYS = 64;

enum class Kind { float32, bfloat16, float16 };

// A matrix of some dtype with unit stride in its rows.
struct Matrix {
  const void* data;
  int64_t stride;
};

struct Result {
  void* data;
  int64_t stride;
};

// Which keys a row sees, and what is added to its logits; pointers may be null. All are of one sample and head.
struct Mask {
  const int32_t* ends[4];  // [all rows]: it sees [0] <= key < [1], and [2] <= key < [3]
  const bool* keys;        // [all keys]: those of the ends that are seen
  const float* bias;       // or a matrix: added
  const bool* seen;        // or a matrix: seen
  int64_t row_stride, key_stride;  // of the matrix
  float slope;             // -slope |row + offset - key| is added, zero for nothing
  int64_t offset;
};

// Which weights are dropped, by the bits that mmkernels/_philox.py defines.
struct Drop {
  uint64_t key;
  uint32_t head, threshold;
  float scale;  // of what is kept; zero for no dropout
};

// Some rows of a head against all keys.
struct Head {
  Kind kind;
  Matrix q, k, v;
  Mask mask;
  Drop drop;
  int64_t first_row, rows, keys, depth;
  float scale;
};

struct HeadForward {
  Head head;
  Result out;  // of the kind
  float* lse;
};

struct HeadBackward {
  Head head;
  Matrix d_out;
  const float *lse, *delta;  // [rows]; delta is sum(out * d_out) less the gradient of lse
  int64_t first_key, last_key;  // of this call
  float* dq;       // [rows, depth], written
  float *dk, *dv;  // [last_key - first_key, padded depth], added to
};

struct AttentionKernels {
  int64_t lanes;           // rows of a block
  int64_t depth_multiple;  // what a padded depth is a multiple of
  // Bytes that each call needs, aligned to 64, beside its arguments.
  int64_t (*forward_bytes)(int64_t depth);
  int64_t (*backward_bytes)(int64_t depth);
  void (*forward)(const HeadForward&, char* scratch);
  void (*backward)(const HeadBackward&, char* scratch);
  // Write float32 as the kind.
  void (*narrow)(Kind kind, const float* from, int64_t count, void* to);
};

extern const AttentionKernels attention_baseline;
#ifdef MMKERNELS_X86
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
extern const AttentionKernels attention_avx512_bf16;
#endif

}  // namespace mmkernels
