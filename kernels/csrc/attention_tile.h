// What attention of all dtypes shares: which keys a block's rows see, and what becomes of their logits.
//
// Everything is in an anonymous namespace, as in simd.h.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

namespace mmkernels {
namespace {

constexpr int64_t LANES_OF_BLOCK = LANE_VECTORS * W;
constexpr float MOST = 0x1.fffffep127f;

INLINE int64_t padded(int64_t size) { return (size + W - 1) / W * W; }

struct Scratch {
  char* next;

  float* take(int64_t count) {
    float* taken = (float*)next;
    next += (count * (int64_t)sizeof(float) + 63) / 64 * 64;
    return taken;
  }
};

// [rows, depth] as float32 [rows, padded depth], times a factor, zeros behind.
template <class T>
void widen(const T* from, int64_t stride, int64_t rows, int64_t depth, float factor, float* to) {
  const int64_t width = padded(depth);
  for (int64_t i = 0; i < rows; ++i)
    for_vectors(0, depth, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      store(to + i * width + j, load(from + i * stride + j, lanes) * factor, All{});
    });
}

// Rows of a product that stay in registers: with a vector a row and lane, and those of the other operand.
constexpr int ROWS = W == 16 ? 6 : W == 8 ? 2 : 4;

// c [R, V vectors] (add: +=) a b: a's entry (r, k) at r a_row + k a_k, b's row k at k b_stride. `P` says what an entry is.
template <class P, int R, int V, class T = typename P::Entry>
INLINE void multiply_rows(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride, int64_t depth, float* c,
                          int64_t c_stride, bool add) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * c_stride + v * W, All{}) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    typename P::Row row[V];
    for (int v = 0; v < V; ++v) row[v] = P::row(b + k * b_stride + v * W);
    for (int r = 0; r < R; ++r) {
      const auto x = P::spread(a + r * a_row + k * a_k);
      for (int v = 0; v < V; ++v) sums[r][v] = P::add(sums[r][v], x, row[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * W, sums[r][v], All{});
}

template <class P, int R, int V, class T = typename P::Entry>
INLINE void multiply_rest(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride, int64_t rows, int64_t depth,
                          float* c, int64_t c_stride, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_rows<P, R, V>(a, a_row, a_k, b, b_stride, depth, c, c_stride, add);
    multiply_rest<P, R - 1, V>(a, a_row, a_k, b, b_stride, rows, depth, c, c_stride, add);
  }
}

template <class P, int V, class T = typename P::Entry>
void multiply_panel(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride, int64_t rows, int64_t depth,
                    float* c, int64_t c_stride, bool add) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    multiply_rows<P, ROWS, V>(a + i * a_row, a_row, a_k, b, b_stride, depth, c + i * c_stride, c_stride, add);
  multiply_rest<P, ROWS - 1, V>(a + i * a_row, a_row, a_k, b, b_stride, rows - i, depth, c + i * c_stride, c_stride, add);
}

// c [rows, cols] (add: +=) a b, cols a multiple of W.
template <class P, class T = typename P::Entry>
void multiply_by(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride, int64_t rows, int64_t cols,
                 int64_t depth, float* c, int64_t c_stride, bool add) {
  for (int64_t j = 0; j < cols; j += LANE_VECTORS * W) {
    const int64_t vectors = (cols - j) / W;
    const auto run = vectors >= 4   ? multiply_panel<P, 4>
                     : vectors == 3 ? multiply_panel<P, 3>
                     : vectors == 2 ? multiply_panel<P, 2>
                                    : multiply_panel<P, 1>;
    run(a, a_row, a_k, b + j, b_stride, rows, depth, c + j, c_stride, add);
  }
}

INLINE int32_t smaller(int32_t x, int32_t y) { return x < y ? x : y; }
INLINE int32_t greater(int32_t x, int32_t y) { return x > y ? x : y; }

// Which keys a block's rows see: some in the spans, all in the whole ones.
struct Seen {
  int32_t lo[2][LANES_OF_BLOCK], hi[2][LANES_OF_BLOCK];
  int32_t first[2], last[2], whole_first[2], whole_last[2];
  int intervals, spans;
};

void look(const Head& head, int64_t lanes, Seen* seen) {
  seen->intervals = head.mask.ends[2] ? 2 : head.mask.ends[0] ? 1 : 0;
  seen->spans = 0;
  if (!seen->intervals) {
    seen->spans = 1;
    seen->first[0] = seen->whole_first[0] = 0;
    seen->last[0] = seen->whole_last[0] = (int32_t)head.keys;
    return;
  }
  for (int n = 0; n < seen->intervals; ++n) {
    const int32_t *lo = head.mask.ends[2 * n] + head.first_row, *hi = head.mask.ends[2 * n + 1] + head.first_row;
    const int32_t keys = (int32_t)head.keys;
    int32_t first = keys, last = 0, whole_first = 0, whole_last = keys;
    for (int64_t i = 0; i < lanes; ++i) {
      const int32_t from = i < head.rows ? greater(lo[i], 0) : 0, to = i < head.rows ? smaller(hi[i], keys) : 0;
      seen->lo[n][i] = from;
      seen->hi[n][i] = to;
      if (i >= head.rows) continue;
      whole_first = greater(whole_first, from);
      whole_last = smaller(whole_last, to);
      if (from >= to) continue;
      first = smaller(first, from);
      last = greater(last, to);
    }
    seen->whole_first[n] = whole_first;
    seen->whole_last[n] = whole_last;
    if (first >= last) continue;
    const int other = seen->spans - 1;
    if (other >= 0 && first <= seen->last[other] && seen->first[other] <= last) {  // a key counts once
      seen->first[other] = smaller(seen->first[other], first);
      seen->last[other] = greater(seen->last[other], last);
      continue;
    }
    seen->first[seen->spans] = first;
    seen->last[seen->spans++] = last;
  }
}

// Calls run(first, count) for each tile of keys from `from` up to `last` of which some row sees one.
template <class Run>
INLINE void for_tiles(const Head& head, const Seen& seen, int64_t from, int64_t last, const Run& run) {
  for (int n = 0; n < seen.spans; ++n) {
    const int64_t end = seen.last[n] < last ? seen.last[n] : last;
    for (int64_t first = seen.first[n] > from ? seen.first[n] : from; first < end; first += TILE_KEYS) {
      const int64_t count = end - first < TILE_KEYS ? end - first : TILE_KEYS;
      bool some = !head.mask.keys;
      for (int64_t j = 0; j < count && !some; ++j) some = head.mask.keys[first + j];
      if (some) run(first, count);
    }
  }
}

// Adds what is added to a tile of logits [keys, lanes], and makes -inf of what is not seen.
void mask_tile(const Head& head, const Seen& seen, int64_t first, int64_t count, int64_t lanes, float* logits) {
  const Mask& mask = head.mask;
  if (mask.bias || mask.seen) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (first + j) * mask.key_stride + head.first_row * mask.row_stride;
      float* row = logits + j * lanes;
      if (mask.bias) {
        for (int64_t i = 0; i < head.rows; ++i) row[i] += mask.bias[at + i * mask.row_stride];
      } else {
        for (int64_t i = 0; i < head.rows; ++i) row[i] = mask.seen[at + i * mask.row_stride] ? row[i] : -INF;
      }
    }
  }
  if (mask.slope != 0) {
    const float place = (float)(head.first_row + mask.offset - first);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < lanes; i += W) {
        const Vec distance = __builtin_convertvector(iota() + (int32_t)i, Vec) + (place - (float)j);
        const Vec size = distance < 0 ? -distance : distance;
        store(logits + j * lanes + i, load(logits + j * lanes + i, All{}) - mask.slope * size, All{});
      }
  }
  bool whole = !seen.intervals;
  for (int n = 0; n < seen.intervals; ++n) whole |= seen.whole_first[n] <= first && first + count <= seen.whole_last[n];
  if (!whole)
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < lanes; i += W) {
        const int32_t key = (int32_t)(first + j);
        Ints inside = (load<Ints>(seen.lo[0] + i) <= key) & (key < load<Ints>(seen.hi[0] + i));
        if (seen.intervals > 1) inside |= (load<Ints>(seen.lo[1] + i) <= key) & (key < load<Ints>(seen.hi[1] + i));
        const Vec s = load(logits + j * lanes + i, All{});
        store(logits + j * lanes + i, inside ? s : splat(-INF), All{});
      }
  if (mask.keys)
    for (int64_t j = 0; j < count; ++j)
      if (!mask.keys[first + j])
        for (int64_t i = 0; i < lanes; i += W) store(logits + j * lanes + i, splat(-INF), All{});
}

// What a tile's weights [keys, lanes] are multiplied by: zero where dropped.
void keep_tile(const Head& head, int64_t first, int64_t count, int64_t lanes, float* factors) {
  const Drop& drop = head.drop;
  for (int64_t i = 0; i < lanes; i += W) {
    const Bits rows = (Bits)iota() + (uint32_t)(head.first_row + i);
    for (int64_t quad = first / 4; 4 * quad < first + count; ++quad) {
      Bits words[4];
      philox((uint32_t)quad + Bits{}, rows, drop.head + Bits{}, drop.key, words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t j = 4 * quad + w - first;
        if (j >= 0 && j < count)
          store(factors + j * lanes + i, words[w] >= drop.threshold ? splat(drop.scale) : Vec{}, All{});
      }
    }
  }
}

// Online sums of a block's rows.
struct Online {
  Vec top[LANE_VECTORS], sums[LANE_VECTORS];

  explicit Online(int64_t vectors) {
    for (int v = 0; v < vectors; ++v) top[v] = splat(-INF), sums[v] = Vec{};
  }
};

// Makes weights exp(S - maximum) of a tile of logits and adds them to the sums; what the result so far [depth, lanes] is
// brought down by, too. `factors`: of dropout, or null.
INLINE void weigh_tile(float* logits, const float* factors, int64_t count, int64_t lanes, Online* online, float* out,
                       int64_t depth, bool is_first) {
  for (int v = 0; v < lanes / W; ++v) {
    float* tile = logits + v * W;
    Vec largest = online->top[v];
    for (int64_t j = 0; j < count; ++j) largest = larger(load(tile + j * lanes, All{}), largest);
    const Vec shift = larger(largest, splat(-MOST));  // -inf - -inf would be NaN
    const Vec shrink = exp(online->top[v] - shift);
    Vec total = online->sums[v] * shrink;
    for (int64_t j = 0; j < count; ++j) {
      const Vec weight = exp(load(tile + j * lanes, All{}) - shift);
      total += weight;
      store(tile + j * lanes, weight, All{});
    }
    if (factors)
      for (int64_t j = 0; j < count; ++j)
        store(tile + j * lanes, load(tile + j * lanes, All{}) * load(factors + j * lanes + v * W, All{}), All{});
    if (!is_first)
      for (int64_t d = 0; d < depth; ++d)
        store(out + d * lanes + v * W, load(out + d * lanes + v * W, All{}) * shrink, All{});
    online->top[v] = largest;
    online->sums[v] = total;
  }
}

// Writes a block's result [depth, lanes] as rows, each over its sum, and its log-sum-exps.
template <class Out>
INLINE void finish_rows(const HeadForward& work, const Online& online, const float* out, int64_t lanes, float* row) {
  const Head& head = work.head;
  float of_lanes[2][LANES_OF_BLOCK];
  for (int v = 0; v < lanes / W; ++v) {
    store(of_lanes[0] + v * W, online.top[v], All{});
    store(of_lanes[1] + v * W, online.sums[v], All{});
  }
  for (int64_t i = 0; i < head.rows; ++i) {
    const float sum = of_lanes[1][i], share = sum == 0 ? 0.0f : 1 / sum;
    work.lse[i] = sum == 0 ? -INF : of_lanes[0][i] + (float)__builtin_log((double)sum);
    Out* to = (Out*)work.out.data + (head.first_row + i) * work.out.stride;
    for (int64_t d = 0; d < head.depth; ++d) row[d] = out[d * lanes + i] * share;
    for_vectors(0, head.depth, [&](int64_t d, auto some) ALWAYS_INLINE { store(to + d, load(row + d, some), some); });
  }
}

// A tile's weights from the log-sum-exps, and the gradients of its logits in place of those of its weights, times `scale`;
// the weights are left as dropout has them.
INLINE void grad_tile(float* weights, float* grads, const float* factors, int64_t count, int64_t lanes, const float* lse,
                      const float* delta, float scale) {
  for (int v = 0; v < lanes / W; ++v) {
    const Vec shift = load(lse + v * W, All{}), taken = load(delta + v * W, All{});
    for (int64_t j = 0; j < count; ++j) {
      float *weight = weights + j * lanes + v * W, *grad = grads + j * lanes + v * W;
      const Vec w = exp(load(weight, All{}) - shift);
      Vec g = load(grad, All{}), dropped = w;
      if (factors) {
        const Vec factor = load(factors + j * lanes + v * W, All{});
        g *= factor;
        dropped *= factor;
      }
      store(weight, dropped, All{});
      store(grad, w * (g - taken) * scale, All{});
    }
  }
}

// A block's log-sum-exps and deltas by lane.
INLINE void rows_of(const HeadBackward& work, int64_t lanes, float* lse, float* delta) {
  for (int64_t i = 0; i < lanes; ++i) {
    const bool is_row = i < work.head.rows;
    // the weights of a row that sees nothing, exp(S - lse), are zero
    lse[i] = is_row && work.lse[i] != -INF ? work.lse[i] : INF;
    delta[i] = is_row ? work.delta[i] : 0.0f;
  }
}

}  // namespace
}  // namespace mmkernels
