// Compiled for AVX-512 with its products of bfloat16 alone.
#include "product_kernels.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define INLINE inline __attribute__((always_inline))

namespace mmkernels {
namespace {

constexpr int W = 16;

INLINE uint32_t pair_at(const Operand& from, int64_t row, int64_t k, int64_t depth) {
  const uint16_t* at = from.data + row * from.stride + k * from.step;
  const uint32_t high = k + 1 < depth ? at[from.step] : 0;
  return at[0] | high << 16;
}

// Transpose 16 vectors of 16 pairs.
INLINE void transpose(__m512i* x) {
  __m512i y[W];
  for (int i = 0; i < W; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// 16 pairs of k of 16 columns of a matrix whose rows are k: the pairs of row k and k + 1, column by column.
INLINE __m512i interleaved(const uint16_t* first, const uint16_t* second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void pack_cols(const Operand& from, int64_t count, int64_t depth, uint32_t* to) {
  const int64_t pairs = (depth + 1) / 2, whole = depth / 2;
  for (int64_t n = 0; n < PANEL_COLS; n += W) {
    const bool is_full = n + W <= count;
    int64_t p = 0;
    if (is_full && from.step == 1) {
      for (; p + W <= whole; p += W) {
        __m512i x[W];
        for (int i = 0; i < W; ++i) x[i] = _mm512_loadu_si512(from.data + (n + i) * from.stride + 2 * p);
        transpose(x);
        for (int i = 0; i < W; ++i) _mm512_storeu_si512(to + (p + i) * PANEL_COLS + n, x[i]);
      }
    } else if (is_full && from.stride == 1) {
      for (; p < whole; ++p) {
        const uint16_t* at = from.data + 2 * p * from.step + n;
        _mm512_storeu_si512(to + p * PANEL_COLS + n, interleaved(at, at + from.step));
      }
    }
    for (; p < pairs; ++p)
      for (int64_t j = n; j < n + W; ++j)
        to[p * PANEL_COLS + j] = j < count ? pair_at(from, j, 2 * p, depth) : 0;
  }
}

void pack_rows(const Operand& from, int64_t count, int64_t depth, uint32_t* to, int64_t to_stride) {
  const int64_t pairs = (depth + 1) / 2, whole = depth / 2;
  for (int64_t m = 0; m < count; m += W) {
    int64_t p = 0;
    if (m + W <= count && from.stride == 1) {
      for (; p + W <= whole; p += W) {
        __m512i x[W];
        for (int i = 0; i < W; ++i) {
          const uint16_t* at = from.data + 2 * (p + i) * from.step + m;
          x[i] = interleaved(at, at + from.step);
        }
        transpose(x);
        for (int i = 0; i < W; ++i) _mm512_storeu_si512(to + (m + i) * to_stride + p, x[i]);
      }
    }
    for (int64_t i = m; i < m + W && i < count; ++i)
      for (int64_t q = p; q < pairs; ++q) to[i * to_stride + q] = pair_at(from, i, 2 * q, depth);
  }
}

template <int R>
INLINE void multiply_rows(const Panel& work, int64_t first) {
  constexpr int VECTORS = PANEL_COLS / W;
  __mmask16 lanes[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t left = work.cols - v * W;
    lanes[v] = left >= W ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
  }
  float* c = work.c + first * work.c_stride;
  __m512 sums[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = work.add ? _mm512_maskz_loadu_ps(lanes[v], c + r * work.c_stride + v * W) : _mm512_setzero_ps();
  const uint16_t* a = work.a + first * work.a_stride;
  const uint32_t* b = work.b;
  for (int64_t p = 0; p < work.pairs; ++p, b += PANEL_COLS) {
    __m512i cols[VECTORS];
    for (int v = 0; v < VECTORS; ++v) cols[v] = _mm512_loadu_si512(b + v * W);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a + r * work.a_stride + 2 * p, sizeof(pair));
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, (__m512bh)cols[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_mask_storeu_ps(c + r * work.c_stride + v * W, lanes[v], sums[r][v]);
}

void multiply(const Panel& work) {
  int64_t first = 0;
  for (; first + ROWS <= work.rows; first += ROWS) multiply_rows<ROWS>(work, first);
  switch (work.rows - first) {
    case 5: return multiply_rows<5>(work, first);
    case 4: return multiply_rows<4>(work, first);
    case 3: return multiply_rows<3>(work, first);
    case 2: return multiply_rows<2>(work, first);
    case 1: return multiply_rows<1>(work, first);
  }
}

}  // namespace

extern const Products products_avx512_bf16 = {pack_cols, pack_rows, multiply};

}  // namespace mmkernels
