// Compiled once for each instruction set, with KERNELS the name of its table. Everything else is in an
// anonymous namespace and no standard header with inline functions is included: the linker could take another
// set's copy of one.
#include "tile_kernels.h"

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace mmkernels {
namespace {

constexpr int64_t W = LANES;
// a lane is summed in float over 32 vectors at most, then in double
constexpr int64_t CHUNK = 32 * W;
constexpr float INF = __builtin_inff();
constexpr float MOST = 0x1.fffffep127f;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

// Which lanes of a vector lie inside the tile: all, or the first few.
struct All {};
struct First {
  int64_t count;
};

INLINE Vec splat(float x) { return x - Vec{}; }

INLINE Ints iota() {
  Ints lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

template <class T>
INLINE T load(const void* from, int64_t bytes = sizeof(T)) {
  T x{};
  __builtin_memcpy(&x, from, bytes);
  return x;
}

INLINE Vec load(const float* from, All) { return load<Vec>(from); }
INLINE Vec load(const float* from, First lanes) { return load<Vec>(from, lanes.count * sizeof(float)); }

template <class T, class V>
INLINE void put(T* to, V x, All) {
  __builtin_memcpy(to, &x, sizeof(x));
}
template <class T, class V>
INLINE void put(T* to, V x, First lanes) {
  __builtin_memcpy(to, &x, lanes.count * sizeof(T));
}

INLINE void store(float* to, Vec x, auto lanes) { put(to, x, lanes); }

// bfloat16, rounded to nearest even; a NaN stays one.
INLINE void store(uint16_t* to, Vec x, auto lanes) {
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  put(to, __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves), lanes);
}

// `x`, and `fill` outside of the tile.
INLINE Vec inside(Vec x, float, All) { return x; }
INLINE Vec inside(Vec x, float fill, First lanes) { return iota() < (int32_t)lanes.count ? x : splat(fill); }

template <class Body>
INLINE void for_vectors(int64_t first, int64_t last, Body&& body) {
  int64_t j = first;
  for (; j + W <= last; j += W) body(j, All{});
  if (j < last) body(j, First{last - j});
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger; `m` where `x` is NaN: the sums catch that.
INLINE Vec larger(Vec x, Vec m) { return x > m ? x : m; }

// exp within 0.9 ulp, 1.2 without fused multiply-add; zero below -86.99, near the smallest normal number.
INLINE Vec exp(Vec x) {
  // 2^n e^r, |r| <= ln 2 / 2; NaN passes both bounds, beyond which nothing changes any more
  x = -87.5f > x ? splat(-87.5f) : x;
  x = 89.0f < x ? splat(89.0f) : x;
  // the sum's last bits are n + 126, the exponent of 2^(n - 1)
  const float magic = 0x1.8p23f + 126;
  Vec t = fma(x, splat(0x1.715476p0f), splat(magic));
  Vec n = t - magic;
  // ln 2 in two parts, of which n times the first is exact
  Vec r = fma(n, splat(-0x1.63p-1f), x);
  r = fma(n, splat(0x1.bd0106p-13f), r);
  // 2 e^r, minimax: 3e-9
  Vec p = fma(r, splat(2 * 0x1.6a23ccp-10f), splat(2 * 0x1.123a20p-7f));
  p = fma(p, r, splat(2 * 0x1.5558f2p-5f));
  p = fma(p, r, splat(2 * 0x1.555492p-3f));
  p = fma(p, r, splat(2 * 0x1.fffffcp-2f));
  p = fma(p, r, splat(2));
  p = fma(p, r, splat(2));
  return p * (Vec)((Bits)t << 23);
}

INLINE float exp(float x) { return exp(splat(x))[0]; }

INLINE float maximum(Vec x) {
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

INLINE Doubles widened(Vec x) { return __builtin_convertvector(x, Doubles); }

INLINE double sum(Vec x) {
  Doubles wide = widened(x);
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) wide[i] += wide[i + half];
  return wide[0];
}

INLINE int64_t chunk_end(int64_t first, int64_t cols) { return cols - first < CHUNK ? cols : first + CHUNK; }

// What a maximum is subtracted as: -inf - -inf would be NaN.
INLINE Vec shift_of(Vec largest) { return larger(largest, splat(-MOST)); }

template <bool COLS>
INLINE float row_maximum(const Tile& tile, const float* cosines, float* col_max) {
  Vec largest = splat(-INF);
  for_vectors(0, tile.cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    Vec s = inside(load(cosines + j, lanes) * tile.scale, -INF, lanes);
    largest = larger(s, largest);
    if (COLS) store(col_max + j, larger(s, load(col_max + j, All{})), All{});
  });
  return maximum(largest);
}

template <bool COLS>
INLINE double row_total(const Tile& tile, const float* cosines, float row_shift, const float* col_max,
                        float* col_sum) {
  double total = 0;
  for (int64_t first = 0; first < tile.cols; first += CHUNK) {
    Vec part{};
    for_vectors(first, chunk_end(first, tile.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      Vec s = inside(load(cosines + j, lanes) * tile.scale, -INF, lanes);
      part += exp(s - row_shift);
      if (COLS) {
        Vec e = exp(s - shift_of(load(col_max + j, All{})));
        store(col_sum + j, load(col_sum + j, All{}) + e, All{});
      }
    });
    total += sum(part);
  }
  return total;
}

template <bool COLS>
void fold_panel(const Fold& fold, int64_t rows) {
  const Tile tile = fold.tile;
  if (COLS) {
    for (int64_t j = 0; j < tile.cols; j += W) {
      store(fold.col_max + j, splat(-INF), All{});
      store(fold.col_sum + j, Vec{}, All{});
    }
  }
  float largest[PANEL];
  for (int64_t i = 0; i < rows; ++i)
    largest[i] = row_maximum<COLS>(tile, tile.cosines + i * tile.stride, fold.col_max);
  for (int64_t i = 0; i < rows; ++i) {
    const float before = fold.row_max[i];
    const float after = largest[i] > before ? largest[i] : before;
    const float shift = after > -MOST ? after : -MOST;
    const double total =
        row_total<COLS>(tile, tile.cosines + i * tile.stride, shift, fold.col_max, fold.col_sum);
    fold.row_sum[i] = (float)((double)fold.row_sum[i] * exp(before - shift) + total);
    fold.row_max[i] = after;
  }
}

void fold(const Fold& work, int64_t rows) {
  work.col_max ? fold_panel<true>(work, rows) : fold_panel<false>(work, rows);
}

void combine(const float* part_max, const float* part_sum, int64_t panels, int64_t padded, int64_t cols,
             float* col_max, float* col_sum) {
  for_vectors(0, cols, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    const Vec before = load(col_max + j, lanes);
    Vec after = before;
    for (int64_t p = 0; p < panels; ++p) after = larger(load(part_max + p * padded + j, All{}), after);
    const Vec shift = shift_of(after);
    Doubles total = widened(load(col_sum + j, lanes) * exp(before - shift));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t at = p * padded + j;
      total += widened(load(part_sum + at, All{}) * exp(load(part_max + at, All{}) - shift));
    }
    store(col_max + j, after, lanes);
    store(col_sum + j, __builtin_convertvector(total, Vec), lanes);
  });
}

template <bool COLS, class Out>
INLINE double grad_row(const Grad& grad, const float* cosines, int64_t i, Out* out) {
  const Tile& tile = grad.tile;
  const float row_lse = grad.row_lse[i];
  const Vec row_coef = splat(grad.row_coef[i]);
  const int64_t skip = grad.skip ? grad.skip[i] : -1;
  double total = 0;
  for (int64_t first = 0; first < tile.cols; first += CHUNK) {
    Vec part{};
    for_vectors(first, chunk_end(first, tile.cols), [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec cosine = load(cosines + j, lanes);
      const Vec s = cosine * tile.scale;
      Vec g = exp(s - row_lse) * row_coef;
      if (COLS) g = fma(exp(s - load(grad.col_lse + j, lanes)), load(grad.col_coef + j, lanes), g);
      Vec product = (cosine - grad.center) * g;
      if ((uint64_t)(skip - j) < (uint64_t)W) {
        const Ints kept = iota() != (int32_t)(skip - j);
        g = kept ? g : Vec{};
        product = kept ? product : Vec{};
      }
      store(out + j, g, lanes);
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

}  // namespace

extern const Kernels KERNELS = {fold, combine, grad};

}  // namespace mmkernels
