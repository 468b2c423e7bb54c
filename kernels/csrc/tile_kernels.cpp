// Compiled once for each instruction set, with KERNELS the name of its table.
#include "tile_kernels.h"

#include "simd.h"

namespace mmkernels {
namespace {

// a lane is summed in float over 32 vectors at most, then in double
constexpr int64_t CHUNK = 32 * W;
constexpr float MOST = 0x1.fffffep127f;

INLINE int64_t chunk_end(int64_t first, int64_t cols) { return cols - first < CHUNK ? cols : first + CHUNK; }

// What a maximum is subtracted as: -inf - -inf would be NaN.
INLINE Vec shift_of(Vec largest) { return larger(largest, splat(-MOST)); }

// -inf in the lane of the column that a row does not see, where that is one of them.
template <bool EXCLUDE>
INLINE Vec seen(Vec s, int64_t lane) {
  if (EXCLUDE && (uint64_t)lane < (uint64_t)W) s = iota() != (int32_t)lane ? s : splat(-INF);
  return s;
}

template <bool COLS, bool EXCLUDE>
INLINE float row_maximum(const Fold& fold, int64_t i) {
  const Tile& tile = fold.tile;
  const float* cosines = tile.cosines + i * tile.stride;
  float* col_max = fold.cols.max;
  const int64_t exclude = EXCLUDE ? fold.exclude[i] : -1;
  Vec largest = splat(-INF);
  for_vectors(0, tile.cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    Vec s = seen<EXCLUDE>(inside(load(cosines + j, lanes) * tile.scale, -INF, lanes), exclude - j);
    largest = larger(s, largest);
    if (COLS) store(col_max + j, larger(s, load(col_max + j, All{})), All{});
  });
  return maximum(largest);
}

struct Totals {
  double sum = 0, cross = 0;
};

template <bool COLS, bool CROSS, bool EXCLUDE>
INLINE Totals row_totals(const Fold& fold, int64_t i, float row_shift) {
  const int64_t exclude = EXCLUDE ? fold.exclude[i] : -1;
  const float* cosines = fold.tile.cosines + i * fold.tile.stride;
  const float* values = CROSS ? fold.values.data + i * fold.values.stride : nullptr;
  Totals totals;
  for (int64_t first = 0; first < fold.tile.cols; first += CHUNK) {
    Vec sums{}, crosses{};
    for_vectors(first, chunk_end(first, fold.tile.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      Vec s = seen<EXCLUDE>(inside(load(cosines + j, lanes) * fold.tile.scale, -INF, lanes), exclude - j);
      Vec value = CROSS ? load(values + j, lanes) : Vec{};
      Vec e = exp(s - row_shift);
      sums += e;
      if (CROSS) crosses = fma(e, value, crosses);
      if (COLS) {
        e = exp(s - shift_of(load(fold.cols.max + j, All{})));
        store(fold.cols.sum + j, load(fold.cols.sum + j, All{}) + e, All{});
        if (CROSS) store(fold.cols.cross + j, fma(e, value, load(fold.cols.cross + j, All{})), All{});
      }
    });
    totals.sum += sum(sums);
    if (CROSS) totals.cross += sum(crosses);
  }
  return totals;
}

template <bool COLS, bool CROSS, bool EXCLUDE>
void fold_panel(const Fold& fold, int64_t rows) {
  const Tile tile = fold.tile;
  if (COLS) {
    for (int64_t j = 0; j < tile.cols; j += W) {
      store(fold.cols.max + j, splat(-INF), All{});
      store(fold.cols.sum + j, Vec{}, All{});
      if (CROSS) store(fold.cols.cross + j, Vec{}, All{});
    }
  }
  float largest[PANEL];
  for (int64_t i = 0; i < rows; ++i)
    largest[i] = row_maximum<COLS, EXCLUDE>(fold, i);
  for (int64_t i = 0; i < rows; ++i) {
    const float before = fold.rows.max[i];
    const float after = largest[i] > before ? largest[i] : before;
    const float shift = after > -MOST ? after : -MOST;
    const Totals totals = row_totals<COLS, CROSS, EXCLUDE>(fold, i, shift);
    const double shrink = exp(before - shift);
    fold.rows.max[i] = after;
    fold.rows.sum[i] = (float)(fold.rows.sum[i] * shrink + totals.sum);
    if (CROSS) fold.rows.cross[i] = (float)(fold.rows.cross[i] * shrink + totals.cross);
  }
}

template <bool EXCLUDE>
void fold_any(const Fold& work, int64_t rows) {
  if (work.values.data)
    work.cols.max ? fold_panel<true, true, EXCLUDE>(work, rows) : fold_panel<false, true, EXCLUDE>(work, rows);
  else
    work.cols.max ? fold_panel<true, false, EXCLUDE>(work, rows) : fold_panel<false, false, EXCLUDE>(work, rows);
}

void fold(const Fold& work, int64_t rows) {
  work.exclude ? fold_any<true>(work, rows) : fold_any<false>(work, rows);
}

void combine(const Sums& parts, int64_t panels, int64_t padded, int64_t cols, const Sums& to) {
  for_vectors(0, cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    const Vec before = load(to.max + j, lanes);
    Vec after = before;
    for (int64_t p = 0; p < panels; ++p) after = larger(load(parts.max + p * padded + j, All{}), after);
    const Vec shift = shift_of(after);
    const auto combined = [&](const float* part, float* whole) ALWAYS_INLINE {
      Doubles total = widened(load(whole + j, lanes) * exp(before - shift));
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = p * padded + j;
        total += widened(load(part + at, All{}) * exp(load(parts.max + at, All{}) - shift));
      }
      store(whole + j, __builtin_convertvector(total, Vec), lanes);
    };
    combined(parts.sum, to.sum);
    if (to.cross) combined(parts.cross, to.cross);
    store(to.max + j, after, lanes);
  });
}

template <bool COLS, class Out>
INLINE double grad_row(const Grad& grad, const float* cosines, int64_t i, Out* out) {
  const Tile& tile = grad.tile;
  const float row_lse = grad.row_lse[i];
  const Vec row_coef = splat(grad.row_coef[i]);
  const int64_t skip = grad.skip ? grad.skip[i] : -1, exclude = grad.exclude ? grad.exclude[i] : -1;
  double total = 0;
  for (int64_t first = 0; first < tile.cols; first += CHUNK) {
    Vec part{};
    for_vectors(first, chunk_end(first, tile.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec cosine = load(cosines + j, lanes);
      const Vec s = cosine * tile.scale;
      Vec g = exp(s - row_lse) * row_coef;
      if (COLS) g = fma(exp(s - load(grad.col_lse + j, lanes)), load(grad.col_coef + j, lanes), g);
      Vec product = (cosine - grad.center) * g;
      const int64_t without[] = {skip - j, exclude - j};
      for (const int64_t lane : without)
        if ((uint64_t)lane < (uint64_t)W) {
          const Ints kept = iota() != (int32_t)lane;
          g = kept ? g : Vec{};
          product = kept ? product : Vec{};
        }
      store(out + j, g * grad.factor, lanes);
      part += inside(product, 0, lanes);
    });
    total += sum(part);
  }
  return total;
}

template <bool COLS, class Out>
double grad_panel(const Grad& grad, int64_t rows) {
  double total = 0;
  Out* out = static_cast<Out*>(grad.out);
  for (int64_t i = 0; i < rows; ++i)
    total += grad_row<COLS>(grad, grad.tile.cosines + i * grad.tile.stride, i, out + i * grad.out_stride);
  return total;
}

double grad(const Grad& work, int64_t rows) {
  if (work.out_bfloat16)
    return work.col_lse ? grad_panel<true, uint16_t>(work, rows) : grad_panel<false, uint16_t>(work, rows);
  return work.col_lse ? grad_panel<true, float>(work, rows) : grad_panel<false, float>(work, rows);
}

template <class Out>
INLINE void sigmoid_row(const Sigmoid& work, const float* cosines, int64_t i, Out* out, double* totals) {
  double row_loss = 0;
  for (int64_t first = 0; first < work.tile.cols; first += CHUNK) {
    Vec losses{}, grads{}, products{};
    for_vectors(first, chunk_end(first, work.tile.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec cosine = load(cosines + j, lanes);
      const Vec x = cosine * work.tile.scale + work.bias;
      const Ints equal = __builtin_convertvector(load(work.col_label + j, lanes) == work.row_label[i], Ints);
      const Vec y = equal ? -x : x;
      const Vec t = exp(y < 0 ? y : -y);
      losses += inside(larger(y, Vec{}) + log1p(t), 0, lanes);
      if (out) {
        const Vec sigmoid = (y < 0 ? t : splat(1)) / (1 + t);
        const Vec g = equal ? -sigmoid : sigmoid;
        store(out + j, g, lanes);
        grads += inside(g, 0, lanes);
        products += inside(g * cosine, 0, lanes);
      }
    });
    row_loss += sum(losses);
    totals[1] += sum(grads);
    totals[2] += sum(products);
  }
  totals[0] += row_loss;
  work.row_loss[i] += (float)row_loss;
}

template <class Out>
void sigmoid_panel(const Sigmoid& work, int64_t rows, double* totals) {
  Out* out = static_cast<Out*>(work.out);
  for (int64_t i = 0; i < rows; ++i) {
    const float* cosines = work.tile.cosines + i * work.tile.stride;
    sigmoid_row(work, cosines, i, out ? out + i * work.out_stride : nullptr, totals);
  }
}

void sigmoid(const Sigmoid& work, int64_t rows, double* totals) {
  totals[0] = totals[1] = totals[2] = 0;
  work.out_bfloat16 ? sigmoid_panel<uint16_t>(work, rows, totals) : sigmoid_panel<float>(work, rows, totals);
}

INLINE Vec teacher_at(const Distill& work, int64_t j, auto lanes) {
  const Vec y = load(work.teacher + j, lanes);
  return work.center ? y - load(work.center + j, lanes) : y;
}

float distill(const Distill& work) {
  Vec student_top = splat(-INF), teacher_top = splat(-INF);
  for_vectors(0, work.cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    student_top = larger(inside(load(work.student + j, lanes), -INF, lanes), student_top);
    teacher_top = larger(inside(teacher_at(work, j, lanes), -INF, lanes), teacher_top);
  });
  // the maximum of the quotients: division rounds in order
  const float student_max = maximum(student_top) / work.student_temp;
  const float teacher_max = maximum(teacher_top) / work.teacher_temp;
  double student_sum = 0, teacher_sum = 0, cross = 0;
  for (int64_t first = 0; first < work.cols; first += CHUNK) {
    Vec of_student{}, of_teacher{}, of_both{};
    for_vectors(first, chunk_end(first, work.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec x = load(work.student + j, lanes) / work.student_temp - student_max;
      const Vec q = exp(teacher_at(work, j, lanes) / work.teacher_temp - teacher_max);
      of_student += inside(exp(x), 0, lanes);
      of_teacher += inside(q, 0, lanes);
      // where both are masked 0 * -inf would be no number
      of_both += inside(q == 0 ? Vec{} : q * x, 0, lanes);
    });
    student_sum += sum(of_student);
    teacher_sum += sum(of_teacher);
    cross += sum(of_both);
  }
  work.stats[0] = student_max;
  work.stats[work.stats_stride] = (float)student_sum;
  work.stats[2 * work.stats_stride] = teacher_max;
  work.stats[3 * work.stats_stride] = (float)teacher_sum;
  return (float)(__builtin_log(student_sum) - cross / teacher_sum);
}

void distill_grad(const Distill& work, float upstream, float* out) {
  const float scale = upstream / work.student_temp;
  const float student_max = work.stats[0], of_student = scale / work.stats[work.stats_stride];
  const float teacher_max = work.stats[2 * work.stats_stride],
              of_teacher = scale / work.stats[3 * work.stats_stride];
  for_vectors(0, work.cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    const Vec p = exp(load(work.student + j, lanes) / work.student_temp - student_max) * of_student;
    const Vec q = exp(teacher_at(work, j, lanes) / work.teacher_temp - teacher_max) * of_teacher;
    store(out + j, p - q, lanes);
  });
}

void dropout(const Dropout& work) {
  const int64_t last = work.first + work.cols;
  uint32_t words[4][W];
  for (int64_t quad = work.first / 4; 4 * quad < last; quad += W) {
    philox((uint32_t)quad, work.row, work.head, work.key, words);
    const int64_t from = 4 * quad < work.first ? work.first : 4 * quad;
    const int64_t to = 4 * (quad + W) < last ? 4 * (quad + W) : last;
    for (int64_t j = from; j < to; ++j) {
      float& weight = work.weights[j - work.first];
      weight = words[j & 3][(j >> 2) - quad] >= work.threshold ? weight * work.scale : 0.0f;
    }
  }
}

}  // namespace

extern const Kernels KERNELS = {fold, combine, grad, sigmoid, distill, distill_grad, dropout};

}  // namespace mmkernels
