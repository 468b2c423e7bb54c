// The native ops on a CPU: mmkernels/_tile.py, distill/blockwise.py and _philox.py say what they compute.
//
// A tile is cut into panels of PANEL rows whatever the number of threads: each row belongs to one panel, each
// panel has its own column sums, and those are combined in order. No bit depends on the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "pick.h"
#include "tile_kernels.h"

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MMKERNELS_X86
const Kernels& kernels = pick(kernels_avx512, kernels_avx2, kernels_baseline);
#else
const Kernels& kernels = kernels_baseline;
#endif

int64_t num_panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// Calls run(first row, rows, panel) for each panel, in parallel.
template <class Run>
void for_panels(int64_t rows, int64_t cols, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / (PANEL * cols));
  torch::stable::parallel_for(0, num_panels(rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * PANEL;
      run(first, std::min(PANEL, rows - first), panel);
    }
  });
}

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
                  name, " must be [m, n] on the CPU with unit column stride");
}

void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == size && x.is_contiguous() && x.scalar_type() == dtype,
                  name, " must be a contiguous vector of ", size, " on the CPU, of the right dtype");
}

Tile tile_of(const Tensor& cosines, double scale) {
  check_matrix(cosines, "cosines");
  STD_TORCH_CHECK(cosines.scalar_type() == ScalarType::Float, "cosines must be float32");
  return {cosines.const_data_ptr<float>(), cosines.stride(0), cosines.size(1), static_cast<float>(scale)};
}

Tile from_row(Tile tile, int64_t first) {
  tile.cosines += first * tile.stride;
  return tile;
}

struct Out {
  void* data = nullptr;
  int64_t stride = 0;
  bool bfloat16 = false;

  void* row(int64_t i) const { return data ? static_cast<char*>(data) + i * stride * (bfloat16 ? 2 : 4) : data; }
};

Out out_of(const Tensor& out, const Tensor& cosines) {
  check_matrix(out, "out");
  const bool bfloat16 = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || out.scalar_type() == ScalarType::Float, "out must be float32 or bfloat16");
  STD_TORCH_CHECK(out.size(0) == cosines.size(0) && out.size(1) == cosines.size(1),
                  "out must have the shape of cosines");
  return {out.mutable_data_ptr(), out.stride(0), bfloat16};
}

Sums from(Sums sums, int64_t first) {
  return {sums.max + first, sums.sum + first, sums.cross ? sums.cross + first : nullptr};
}

// Folds all rows into the online sums of the rows and, where they are not null, of the columns.
void fold_panels(const Tile& tile, const Values& values, int64_t rows, const Sums& to_rows, const Sums& to_cols,
                 const int64_t* exclude = nullptr) {
  const int64_t cols = tile.cols, panels = num_panels(rows);
  if (!rows || !cols) return;
  const int64_t padded = to_cols.max ? (cols + PAD - 1) / PAD * PAD : 0, size = panels * padded;
  const std::unique_ptr<float[]> partial(size ? new float[(values.data ? 3 : 2) * size] : nullptr);
  Sums parts = {};
  if (size) parts = {partial.get(), partial.get() + size, values.data ? partial.get() + 2 * size : nullptr};
  for_panels(rows, cols, [&](int64_t first, int64_t count, int64_t panel) {
    Fold part = {from_row(tile, first), values, from(to_rows, first), {}};
    if (values.data) part.values.data += first * values.stride;
    if (size) part.cols = from(parts, panel * padded);
    if (exclude) part.exclude = exclude + first;
    kernels.fold(part, count);
  });
  if (size) kernels.combine(parts, panels, padded, cols, to_cols);
}

// Writes all rows of the gradient; the sum of out * (cosine - center).
double grad_panels(const Grad& whole, const Out& to, int64_t rows) {
  std::vector<double> totals(num_panels(rows));
  if (whole.tile.cols)
    for_panels(rows, whole.tile.cols, [&](int64_t first, int64_t count, int64_t panel) {
      Grad part = whole;
      part.tile = from_row(whole.tile, first);
      part.row_lse += first;
      part.row_coef += first;
      if (part.skip) part.skip += first;
      if (part.exclude) part.exclude += first;
      part.out = to.row(first);
      totals[panel] = kernels.grad(part, count);
    });
  return std::accumulate(totals.begin(), totals.end(), 0.0);
}

const int64_t* columns_of(const std::optional<Tensor>& x, int64_t size, const char* name) {
  if (!x) return nullptr;
  check_vector(*x, size, ScalarType::Long, name);
  return x->const_data_ptr<int64_t>();
}

float* vector_of(const std::optional<Tensor>& x, int64_t size, const char* name) {
  if (!x) return nullptr;
  check_vector(*x, size, ScalarType::Float, name);
  return x->mutable_data_ptr<float>();
}

void fold_tile(const Tensor& cosines, double scale, const Tensor& row_max, const Tensor& row_sum,
               const std::optional<Tensor>& col_max, const std::optional<Tensor>& col_sum,
               const std::optional<Tensor>& values, const std::optional<Tensor>& row_cross,
               const std::optional<Tensor>& col_cross, const std::optional<Tensor>& exclude) {
  const Tile tile = tile_of(cosines, scale);
  const int64_t rows = cosines.size(0), cols = tile.cols;
  STD_TORCH_CHECK(col_max.has_value() == col_sum.has_value(), "col_max and col_sum come together");
  STD_TORCH_CHECK(values.has_value() == row_cross.has_value() &&
                      (values.has_value() && col_max.has_value()) == col_cross.has_value(),
                  "values and the cross sums come together");
  Values weighed = {};
  if (values) {
    const Tile like = tile_of(*values, 1);
    STD_TORCH_CHECK(values->size(0) == rows && like.cols == cols, "values must have the shape of cosines");
    weighed = {like.cosines, like.stride};
  }
  fold_panels(tile, weighed, rows,
              {vector_of(row_max, rows, "row_max"), vector_of(row_sum, rows, "row_sum"),
               vector_of(row_cross, rows, "row_cross")},
              {vector_of(col_max, cols, "col_max"), vector_of(col_sum, cols, "col_sum"),
               vector_of(col_cross, cols, "col_cross")},
              columns_of(exclude, rows, "exclude"));
}

Tensor grad_tile(const Tensor& cosines, double scale, const Tensor& row_lse, const Tensor& row_coef,
                 const std::optional<Tensor>& col_lse, const std::optional<Tensor>& col_coef,
                 const std::optional<Tensor>& skip, std::optional<double> center, const Tensor& out,
                 const std::optional<Tensor>& exclude) {
  const Tile tile = tile_of(cosines, scale);
  const int64_t rows = cosines.size(0), cols = tile.cols;
  check_vector(row_lse, rows, ScalarType::Float, "row_lse");
  check_vector(row_coef, rows, ScalarType::Float, "row_coef");
  STD_TORCH_CHECK(col_lse.has_value() == col_coef.has_value(), "col_lse and col_coef come together");
  if (col_lse) {
    check_vector(*col_lse, cols, ScalarType::Float, "col_lse");
    check_vector(*col_coef, cols, ScalarType::Float, "col_coef");
  }
  const Out to = out_of(out, cosines);
  const Grad whole = {tile,
                      row_lse.const_data_ptr<float>(),
                      row_coef.const_data_ptr<float>(),
                      col_lse ? col_lse->const_data_ptr<float>() : nullptr,
                      col_coef ? col_coef->const_data_ptr<float>() : nullptr,
                      columns_of(skip, rows, "skip"),
                      static_cast<float>(center.value_or(0)),
                      to.data,
                      to.stride,
                      to.bfloat16,
                      1,
                      columns_of(exclude, rows, "exclude")};
  const double sum = grad_panels(whole, to, rows);
  Tensor total = torch::stable::empty({}, ScalarType::Double);
  *total.mutable_data_ptr<double>() = center ? sum : 0.0;
  return total;
}

Tensor info_nce_tile(const Tensor& cosines, double scale, std::optional<double> center) {
  const Tile tile = tile_of(cosines, scale);
  const int64_t size = tile.cols;
  STD_TORCH_CHECK(size && cosines.size(0) == size, "cosines must be square");
  std::vector<float> vectors(4 * size);
  float *row_max = vectors.data(), *col_max = row_max + size, *row_sum = col_max + size, *col_sum = row_sum + size;
  std::fill_n(row_max, 2 * size, -std::numeric_limits<float>::infinity());
  fold_panels(tile, {}, size, {row_max, row_sum}, {col_max, col_sum});

  float* entries = cosines.mutable_data_ptr<float>();
  const float offset = static_cast<float>(center.value_or(0));
  double loss = 0, of_positives = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float cosine = entries[i * (tile.stride + 1)];
    const double logit = tile.scale * cosine;
    loss += (row_max[i] - logit) + std::log(double(row_sum[i])) + (col_max[i] - logit) + std::log(double(col_sum[i]));
    of_positives += cosine - offset;
  }
  Tensor sums = torch::stable::empty({2}, ScalarType::Double);
  double* to = sums.mutable_data_ptr<double>();
  to[0] = loss / (2 * size);
  to[1] = 0;
  if (!center) return sums;

  // relative to the maxima, not to a rounded log-sum-exp
  for (int64_t i = 0; i < size; ++i) {
    row_sum[i] = 1 / (2 * size * row_sum[i]);
    col_sum[i] = 1 / (2 * size * col_sum[i]);
  }
  const Grad whole = {tile, row_max, row_sum, col_max, col_sum, nullptr, offset, entries, tile.stride, false, tile.scale};
  to[1] = grad_panels(whole, {entries, tile.stride}, size) - of_positives / size;
  for (int64_t i = 0; i < size; ++i) entries[i * (tile.stride + 1)] -= tile.scale / size;
  return sums;
}

Tensor sigmoid_tile(const Tensor& cosines, double scale, double bias, const Tensor& row_label,
                    const Tensor& col_label, const Tensor& row_loss, const std::optional<Tensor>& out) {
  const Tile tile = tile_of(cosines, scale);
  const int64_t rows = cosines.size(0), cols = tile.cols;
  check_vector(row_label, rows, ScalarType::Long, "row_label");
  check_vector(col_label, cols, ScalarType::Long, "col_label");
  check_vector(row_loss, rows, ScalarType::Float, "row_loss");
  const Out to = out ? out_of(*out, cosines) : Out{};
  const Sigmoid whole = {tile,
                         static_cast<float>(bias),
                         row_label.const_data_ptr<int64_t>(),
                         col_label.const_data_ptr<int64_t>(),
                         row_loss.mutable_data_ptr<float>(),
                         to.data,
                         to.stride,
                         to.bfloat16};
  std::vector<double> totals(3 * num_panels(rows));
  if (cols)
    for_panels(rows, cols, [&](int64_t first, int64_t count, int64_t panel) {
      Sigmoid part = whole;
      part.tile = from_row(tile, first);
      part.row_label += first;
      part.row_loss += first;
      part.out = to.row(first);
      kernels.sigmoid(part, count, &totals[3 * panel]);
    });
  Tensor sums = torch::stable::empty({3}, ScalarType::Double);
  double* sums_ptr = sums.mutable_data_ptr<double>();
  std::fill_n(sums_ptr, 3, 0.0);
  for (size_t i = 0; i < totals.size(); ++i) sums_ptr[i % 3] += totals[i];
  return sums;
}

Distill distill_of(const Tensor& student, const Tensor& teacher, double student_temp, double teacher_temp,
                   const std::optional<Tensor>& center, const Tensor& stats) {
  for (const Tensor& x : {student, teacher}) {
    check_matrix(x, "student and teacher");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                    "student and teacher must be contiguous float32");
  }
  const int64_t rows = student.size(0), cols = student.size(1);
  STD_TORCH_CHECK(teacher.size(0) == rows && teacher.size(1) == cols, "teacher must have the shape of student");
  if (center) check_vector(*center, cols, ScalarType::Float, "center");
  check_matrix(stats, "stats");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.size(0) == 4 && stats.size(1) == rows,
                  "stats must be float32 [4, rows]");
  return {student.const_data_ptr<float>(),
          teacher.const_data_ptr<float>(),
          center ? center->const_data_ptr<float>() : nullptr,
          cols,
          static_cast<float>(student_temp),
          static_cast<float>(teacher_temp),
          stats.mutable_data_ptr<float>(),
          stats.stride(0)};
}

// Calls run(row's work, row) for each row, in parallel.
template <class Run>
void for_rows(const Distill& whole, int64_t rows, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, whole.cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Distill row = whole;
      row.student += i * whole.cols;
      row.teacher += i * whole.cols;
      row.stats += i;
      run(row, i);
    }
  });
}

void distill_fwd(const Tensor& student, const Tensor& teacher, double student_temp, double teacher_temp,
                 const std::optional<Tensor>& center, const Tensor& losses, const Tensor& stats) {
  const Distill whole = distill_of(student, teacher, student_temp, teacher_temp, center, stats);
  check_vector(losses, student.size(0), ScalarType::Float, "losses");
  float* to = losses.mutable_data_ptr<float>();
  for_rows(whole, student.size(0), [&](const Distill& row, int64_t i) { to[i] = kernels.distill(row); });
}

void distill_bwd(const Tensor& student, const Tensor& teacher, double student_temp, double teacher_temp,
                 const std::optional<Tensor>& center, const Tensor& stats, const Tensor& grad,
                 const Tensor& out) {
  const Distill whole = distill_of(student, teacher, student_temp, teacher_temp, center, stats);
  check_vector(grad, student.size(0), ScalarType::Float, "grad");
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == ScalarType::Float, "out must be contiguous float32");
  const float* upstream = grad.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_rows(whole, student.size(0), [&](const Distill& row, int64_t i) {
    kernels.distill_grad(row, upstream[i], to + i * whole.cols);
  });
}

void dropout_tile(const Tensor& weights, const Tensor& heads, int64_t first_row, int64_t first_col, const Tensor& seed,
                  double threshold, double scale) {
  STD_TORCH_CHECK(weights.is_cpu() && weights.dim() == 3 && weights.is_contiguous() &&
                      weights.scalar_type() == ScalarType::Float,
                  "weights must be contiguous float32 [n, m, k] on the CPU");
  const int64_t tiles = weights.size(0), rows = weights.size(1), cols = weights.size(2);
  check_vector(heads, tiles, ScalarType::Long, "heads");
  STD_TORCH_CHECK(seed.is_cpu() && seed.dim() == 0 && seed.scalar_type() == ScalarType::Long, "seed must be int64 []");
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const int64_t* head = heads.const_data_ptr<int64_t>();
  float* data = weights.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, tiles * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.dropout({data + i * cols, first_col, cols, static_cast<uint32_t>(first_row + i % rows),
                       static_cast<uint32_t>(head[i / rows]), key, static_cast<uint32_t>(threshold), static_cast<float>(scale)});
  });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "fold_tile(Tensor cosines, float scale, Tensor(a!) row_max, Tensor(b!) row_sum, "
      "Tensor(c!)? col_max, Tensor(d!)? col_sum, Tensor? values, Tensor(e!)? row_cross, Tensor(f!)? col_cross, "
      "Tensor? exclude=None) -> ()");
  m.def(
      "grad_tile(Tensor cosines, float scale, Tensor row_lse, Tensor row_coef, Tensor? col_lse, "
      "Tensor? col_coef, Tensor? skip, float? center, Tensor(a!) out, Tensor? exclude=None) -> Tensor");
  m.def("info_nce_tile(Tensor(a!) cosines, float scale, float? center) -> Tensor");
  m.def(
      "sigmoid_tile(Tensor cosines, float scale, float bias, Tensor row_label, Tensor col_label, "
      "Tensor(a!) row_loss, Tensor(b!)? out) -> Tensor");
  m.def(
      "dropout_tile(Tensor(a!) weights, Tensor heads, int first_row, int first_col, Tensor seed, float threshold, "
      "float scale) -> ()");
  m.def(
      "distill_fwd(Tensor student, Tensor teacher, float student_temp, float teacher_temp, Tensor? center, "
      "Tensor(a!) losses, Tensor(b!) stats) -> ()");
  m.def(
      "distill_bwd(Tensor student, Tensor teacher, float student_temp, float teacher_temp, Tensor? center, "
      "Tensor stats, Tensor grad, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("fold_tile", TORCH_BOX(&mmkernels::fold_tile));
  m.impl("grad_tile", TORCH_BOX(&mmkernels::grad_tile));
  m.impl("info_nce_tile", TORCH_BOX(&mmkernels::info_nce_tile));
  m.impl("sigmoid_tile", TORCH_BOX(&mmkernels::sigmoid_tile));
  m.impl("dropout_tile", TORCH_BOX(&mmkernels::dropout_tile));
  m.impl("distill_fwd", TORCH_BOX(&mmkernels::distill_fwd));
  m.impl("distill_bwd", TORCH_BOX(&mmkernels::distill_bwd));
}
