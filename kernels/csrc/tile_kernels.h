// The elementwise work on a few rows of a tile, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

// Rows of a panel: what one thread takes at a time. 128 KiB at 1024 columns, so that it stays in an L2 cache
// between the passes over it.
constexpr int64_t PANEL = 32;
// A panel's partial sums of the columns are padded to whole vectors of the widest instruction set.
constexpr int64_t PAD = 16;

// Float32 cosines from some row on, with unit column stride; S = scale * cosine.
struct Tile {
  const float* cosines;
  int64_t stride, cols;
  float scale;
};

// What one exponential each is a weight of; `data` null: nothing, and no cross sums.
struct Values {
  const float* data;
  int64_t stride;
};

// Online sums of rows or of columns: the maximum, sum exp(S - max), and sum exp(S - max) value.
struct Sums {
  float *max, *sum, *cross;
};

struct Fold {
  Tile tile;
  Values values;
  Sums rows;
  // the panel's own partial sums [padded], written; or null
  Sums cols;
  const int64_t* exclude = nullptr;  // the column of each row that counts as -inf; null: none
};

struct Grad {
  Tile tile;
  const float *row_lse, *row_coef;
  const float *col_lse, *col_coef;  // null: no column term
  const int64_t* skip;              // null: nothing is skipped
  float center;
  void* out;
  int64_t out_stride;
  bool out_bfloat16;
  float factor = 1;  // of what is written, not of the sum
  const int64_t* exclude = nullptr;  // as skip
};

struct Sigmoid {
  Tile tile;
  float bias;
  const int64_t *row_label, *col_label;
  float* row_loss;  // added to
  void* out;        // null: no gradient
  int64_t out_stride;
  bool out_bfloat16;
};

// Contiguous rows of logits, and the stride between the vectors of statistics: of the student and then of the
// teacher the maximum and sum exp(x - max).
struct Distill {
  const float *student, *teacher;
  const float* center;  // null: zero
  int64_t cols;
  float student_temp, teacher_temp;
  float* stats;
  int64_t stats_stride;
};

// A row of attention weights: those of the keys from `first` on, of which dropout zeroes some.
struct Dropout {
  float* weights;
  int64_t first, cols;
  uint32_t row, head;
  uint64_t key;
  uint32_t threshold;  // of 32 random bits, from which on a weight is kept
  float scale;         // of what is kept
};

struct Kernels {
  // Fold `rows` rows into the online sums of the rows, and into the panel's partial sums of the columns.
  void (*fold)(const Fold&, int64_t rows);
  // Combine the panels' partial sums [panels, padded] with the online sums of the columns, in order.
  void (*combine)(const Sums& parts, int64_t panels, int64_t padded, int64_t cols, const Sums& to);
  // Write `rows` rows of the gradient; their sum of out * (cosine - center).
  double (*grad)(const Grad&, int64_t rows);
  // The sums of the losses, of the gradient and of gradient * cosine over `rows` rows.
  void (*sigmoid)(const Sigmoid&, int64_t rows, double* totals);
  // The statistics of one row; its loss.
  float (*distill)(const Distill&);
  // One row of the student's gradient, from the statistics.
  void (*distill_grad)(const Distill&, float upstream, float* out);
  // One row in place, by the bits that mmkernels/_philox.py defines.
  void (*dropout)(const Dropout&);
};

extern const Kernels kernels_baseline;
#ifdef MMKERNELS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace mmkernels
