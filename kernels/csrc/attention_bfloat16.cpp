// Attention of bfloat16 by AVX-512's products of bfloat16, summed in float32; other dtypes as without them.
//
// A pair is two bfloat16 that follow each other in the sum's index, in 32 bits.
#include "attention_tile.h"

namespace mmkernels {
namespace {

typedef uint32_t Pair;

INLINE __m512i pairs_of(Vec first, Vec second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

struct Pairs {
  typedef Pair Entry;
  typedef __m512i Row;
  static INLINE Row row(const Pair* b) { return _mm512_loadu_si512(b); }
  static INLINE __m512bh spread(const Pair* a) {
    int32_t pair;  // of two bfloat16, which is what lies there
    __builtin_memcpy(&pair, a, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static INLINE Vec add(Vec sum, __m512bh x, Row row) { return _mm512_dpbf16_ps(sum, x, (__m512bh)row); }
};

constexpr auto multiply = &multiply_by<Pairs>;

// Rows of bfloat16 in pairs of depth, by lanes: [depth / 2, lanes], zeros behind the rows.
void by_lanes(const BFloat* from, int64_t stride, int64_t rows, int64_t lanes, int64_t depth, Pair* to) {
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t p = 0; p < depth / 2; ++p) {
      Pair pair = 0;
      if (i < rows) __builtin_memcpy(&pair, from + i * stride + 2 * p, sizeof(pair));
      to[p * lanes + i] = pair;
    }
}

// Rows of bfloat16 in pairs of rows: [pairs, padded depth], zeros behind both.
void by_rows(const BFloat* from, int64_t stride, int64_t rows, int64_t pairs, int64_t depth, Pair* to) {
  const int64_t width = padded(depth);
  for (int64_t p = 0; p < pairs; ++p)
    for_vectors(0, depth, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const auto row = [&](int64_t i) ALWAYS_INLINE {
        return i < rows ? __builtin_convertvector(load_bits(from + i * stride + j, lanes), Bits) : Bits{};
      };
      put(to + p * width + j, row(2 * p) | row(2 * p + 1) << 16, All{});
    });
}

// A tile [keys, lanes] of float32 in pairs of keys, [pairs, lanes], zeros behind.
INLINE void by_keys(const float* from, int64_t count, int64_t lanes, Pair* to) {
  for (int64_t p = 0; 2 * p < count; ++p)
    for (int64_t i = 0; i < lanes; i += W) {
      const Vec first = load(from + 2 * p * lanes + i, All{});
      const Vec second = 2 * p + 1 < count ? load(from + (2 * p + 1) * lanes + i, All{}) : Vec{};
      _mm512_storeu_si512(to + p * lanes + i, pairs_of(first, second));
    }
}

INLINE void scale_tile(float* logits, int64_t size, float scale) {
  for (int64_t i = 0; i < size; i += W) store(logits + i, load(logits + i, All{}) * scale, All{});
}

INLINE void round_tile(const float* from, int64_t size, BFloat* to) {
  for (int64_t i = 0; i < size; i += W) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(load(from + i, All{}));
    _mm256_storeu_si256((__m256i*)(to + i), halves);
  }
}

constexpr int64_t PAIRS = TILE_KEYS / 2;

int64_t forward_bytes(int64_t depth) {
  const int64_t own = 4 * (LANES_OF_BLOCK * (3 * padded(depth) + 2 * TILE_KEYS + PAIRS) + PAIRS * padded(depth)) + 1024;
  const int64_t other = attention_avx512.forward_bytes(depth);
  return own > other ? own : other;
}

INLINE void forward_block(const HeadForward& work, char* memory) {
  const Head& head = work.head;
  const int64_t depth = head.depth, width = padded(depth), lanes = padded(head.rows);
  Scratch scratch = {memory};
  Pair* q_lanes = (Pair*)scratch.take(LANES_OF_BLOCK * width / 2);
  float *row = scratch.take(width), *out = scratch.take(LANES_OF_BLOCK * width);
  float *logits = scratch.take(LANES_OF_BLOCK * TILE_KEYS), *factors = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  Pair *weights = (Pair*)scratch.take(LANES_OF_BLOCK * PAIRS), *values = (Pair*)scratch.take(PAIRS * width);
  const BFloat *k = (const BFloat*)head.k.data, *v = (const BFloat*)head.v.data;
  by_lanes((const BFloat*)head.q.data + head.first_row * head.q.stride, head.q.stride, head.rows, lanes, depth, q_lanes);
  for (int64_t i = 0; i < depth * lanes; i += W) store(out + i, Vec{}, All{});
  Online online(lanes / W);
  Seen seen;
  look(head, lanes, &seen);
  bool is_first = true;
  for_tiles(head, seen, 0, head.keys, [&](int64_t first, int64_t count) ALWAYS_INLINE {
    multiply((const Pair*)(k + first * head.k.stride), head.k.stride / 2, 1, q_lanes, lanes, count, lanes, depth / 2,
             logits, lanes, false);
    scale_tile(logits, count * lanes, head.scale);
    mask_tile(head, seen, first, count, lanes, logits);
    if (head.drop.scale != 0) keep_tile(head, first, count, lanes, factors);
    weigh_tile(logits, head.drop.scale != 0 ? factors : nullptr, count, lanes, &online, out, depth, is_first);
    is_first = false;
    by_keys(logits, count, lanes, weights);
    by_rows(v + first * head.v.stride, head.v.stride, count, (count + 1) / 2, depth, values);
    multiply(values, 1, width, weights, lanes, depth, lanes, (count + 1) / 2, out, lanes, true);
  });
  finish_rows<BFloat>(work, online, out, lanes, row);
}

int64_t backward_bytes(int64_t depth) {
  const int64_t width = padded(depth), by_lane = LANES_OF_BLOCK * width / 2;
  const int64_t own = 4 * (4 * by_lane + LANES_OF_BLOCK * (width + 5 * TILE_KEYS) + PAIRS * width) + 2048;
  const int64_t other = attention_avx512.backward_bytes(depth);
  return own > other ? own : other;
}

INLINE void backward_block(const HeadBackward& work, char* memory) {
  const Head& head = work.head;
  const int64_t depth = head.depth, width = padded(depth), lanes = padded(head.rows), at = head.first_row;
  Scratch scratch = {memory};
  Pair *q_lanes = (Pair*)scratch.take(LANES_OF_BLOCK * width / 2), *q = (Pair*)scratch.take(LANES_OF_BLOCK * width / 2);
  Pair *d_out_lanes = (Pair*)scratch.take(LANES_OF_BLOCK * width / 2);
  Pair *d_out = (Pair*)scratch.take(LANES_OF_BLOCK * width / 2), *keys = (Pair*)scratch.take(PAIRS * width);
  float *dq = scratch.take(LANES_OF_BLOCK * width), *weights = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  float *grads = scratch.take(LANES_OF_BLOCK * TILE_KEYS), *factors = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  Pair* paired = (Pair*)scratch.take(LANES_OF_BLOCK * PAIRS);
  BFloat* rounded = (BFloat*)scratch.take(LANES_OF_BLOCK * PAIRS);
  const BFloat *k = (const BFloat*)head.k.data, *v = (const BFloat*)head.v.data;
  const BFloat* q_rows = (const BFloat*)head.q.data + at * head.q.stride;
  const BFloat* d_out_rows = (const BFloat*)work.d_out.data + at * work.d_out.stride;
  by_lanes(q_rows, head.q.stride, head.rows, lanes, depth, q_lanes);
  by_rows(q_rows, head.q.stride, head.rows, lanes / 2, depth, q);
  by_lanes(d_out_rows, work.d_out.stride, head.rows, lanes, depth, d_out_lanes);
  by_rows(d_out_rows, work.d_out.stride, head.rows, lanes / 2, depth, d_out);
  for (int64_t i = 0; i < depth * lanes; i += W) store(dq + i, Vec{}, All{});
  float lse[LANES_OF_BLOCK], delta[LANES_OF_BLOCK];
  rows_of(work, lanes, lse, delta);
  Seen seen;
  look(head, lanes, &seen);
  for_tiles(head, seen, work.first_key, work.last_key, [&](int64_t first, int64_t count) ALWAYS_INLINE {
    multiply((const Pair*)(k + first * head.k.stride), head.k.stride / 2, 1, q_lanes, lanes, count, lanes, depth / 2,
             weights, lanes, false);
    scale_tile(weights, count * lanes, head.scale);
    mask_tile(head, seen, first, count, lanes, weights);
    multiply((const Pair*)(v + first * head.v.stride), head.v.stride / 2, 1, d_out_lanes, lanes, count, lanes, depth / 2,
             grads, lanes, false);
    if (head.drop.scale != 0) keep_tile(head, first, count, lanes, factors);
    grad_tile(weights, grads, head.drop.scale != 0 ? factors : nullptr, count, lanes, lse, delta, head.scale);
    const int64_t place = (first - work.first_key) * width;
    round_tile(weights, count * lanes, rounded);
    multiply((const Pair*)rounded, lanes / 2, 1, d_out, width, count, width, lanes / 2, work.dv + place, width, true);
    round_tile(grads, count * lanes, rounded);
    multiply((const Pair*)rounded, lanes / 2, 1, q, width, count, width, lanes / 2, work.dk + place, width, true);
    by_keys(grads, count, lanes, paired);
    by_rows(k + first * head.k.stride, head.k.stride, count, (count + 1) / 2, depth, keys);
    multiply(keys, 1, width, paired, lanes, depth, lanes, (count + 1) / 2, dq, lanes, true);
  });
  for (int64_t i = 0; i < head.rows; ++i)
    for (int64_t d = 0; d < depth; ++d) work.dq[i * depth + d] = dq[d * lanes + i];
}

// Pairs of depth are read where they are, so that rows must hold whole ones.
INLINE bool has_pairs(const Head& head, const Matrix& rows) {
  return head.kind == Kind::bfloat16 && head.depth % 2 == 0 && (head.k.stride | head.v.stride | rows.stride) % 2 == 0;
}

void forward(const HeadForward& work, char* scratch) {
  if (!has_pairs(work.head, work.head.q)) return attention_avx512.forward(work, scratch);
  forward_block(work, scratch);
}

void backward(const HeadBackward& work, char* scratch) {
  has_pairs(work.head, work.d_out) ? backward_block(work, scratch) : attention_avx512.backward(work, scratch);
}

void narrow(Kind kind, const float* from, int64_t count, void* to) { attention_avx512.narrow(kind, from, count, to); }

}  // namespace

extern const AttentionKernels attention_avx512_bf16 = {LANES_OF_BLOCK, W, forward_bytes, backward_bytes, forward, backward,
                                                       narrow};

}  // namespace mmkernels
