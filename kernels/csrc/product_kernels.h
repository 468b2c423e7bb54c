// Products of bfloat16 operands with float32 results, of one panel of columns, for processors that have them.
#pragma once

#include <cstdint>

namespace mmkernels {

// Columns of a panel: four vectors of the results.
constexpr int64_t PANEL_COLS = 64;
// Rows that one call of the inner kernel keeps in registers.
constexpr int64_t ROWS = 6;
// How deep a packed panel is, in pairs of k: 32 KiB of it stay in a first-level cache.
constexpr int64_t DEPTH = 128;

// A bfloat16 matrix in place: two entries that follow each other in k are `step` apart, rows (columns) `stride`.
struct Operand {
  const uint16_t* data;
  int64_t stride, step;
};

// c [rows, cols] = (add: +=) a [rows, 2 pairs] b^T, all of one panel and one depth.
struct Panel {
  const uint16_t* a;  // row-major, pairs of k side by side
  int64_t a_stride;
  const uint32_t* b;  // packed: [pairs, PANEL_COLS]
  float* c;
  int64_t c_stride;
  int64_t rows, cols, pairs;
  bool add;
};

struct Products {
  // Pack rows [0, count) of `from` and its k [0, depth) as [pairs, PANEL_COLS], zeros where there is neither.
  void (*pack_cols)(const Operand& from, int64_t count, int64_t depth, uint32_t* to);
  // The same as row-major [count, pairs], of which each row starts a multiple of `to_stride` pairs after the first.
  void (*pack_rows)(const Operand& from, int64_t count, int64_t depth, uint32_t* to, int64_t to_stride);
  void (*multiply)(const Panel&);
};

extern const Products products_avx512_bf16;

}  // namespace mmkernels
