// Compiled once for each instruction set, with ATTENTION the name of its table: products in float32, whatever the dtype.
#include "attention_tile.h"

namespace mmkernels {
namespace {

struct Singles {
  typedef float Entry;
  typedef Vec Row;
  static INLINE Row row(const float* b) { return load(b, All{}); }
  static INLINE Vec spread(const float* a) { return splat(*a); }
  static INLINE Vec add(Vec sum, Vec x, Row row) { return fma(x, row, sum); }
};

constexpr auto multiply = &multiply_by<Singles>;

// [rows, width] as [depth, lanes], zeros behind the rows.
void transpose(const float* from, int64_t width, int64_t rows, int64_t lanes, int64_t depth, float* to) {
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t j = 0; j < depth; ++j) to[j * lanes + i] = i < rows ? from[i * width + j] : 0.0f;
}

// Keys or values from some key on as float32 with unit stride: themselves, or a copy.
template <class T>
INLINE const float* keys_of(const Matrix& of, int64_t first, int64_t count, int64_t depth, float* copy, int64_t* stride) {
  const T* from = (const T*)of.data + first * of.stride;
  if constexpr (sizeof(T) == sizeof(float)) {
    *stride = of.stride;
    return from;
  } else {
    widen(from, of.stride, count, depth, 1.0f, copy);
    *stride = padded(depth);
    return copy;
  }
}

int64_t forward_bytes(int64_t depth) {
  const int64_t width = padded(depth);
  return 4 * (LANES_OF_BLOCK * (3 * width + 2 * TILE_KEYS) + 2 * TILE_KEYS * width) + 1024;
}

template <class T>
INLINE void forward_block(const HeadForward& work, char* memory) {
  const Head& head = work.head;
  const int64_t depth = head.depth, width = padded(depth), lanes = padded(head.rows);
  Scratch scratch = {memory};
  float *q = scratch.take(LANES_OF_BLOCK * width), *q_lanes = scratch.take(LANES_OF_BLOCK * width);
  float *out = scratch.take(LANES_OF_BLOCK * width), *logits = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  float* factors = scratch.take(LANES_OF_BLOCK * TILE_KEYS);  // of dropout
  float *k_copy = scratch.take(TILE_KEYS * width), *v_copy = scratch.take(TILE_KEYS * width);
  widen((const T*)head.q.data + head.first_row * head.q.stride, head.q.stride, head.rows, depth, head.scale, q);
  transpose(q, width, head.rows, lanes, depth, q_lanes);
  for (int64_t i = 0; i < depth * lanes; i += W) store(out + i, Vec{}, All{});
  Online online(lanes / W);
  Seen seen;
  look(head, lanes, &seen);
  bool is_first = true;
  for_tiles(head, seen, 0, head.keys, [&](int64_t first, int64_t count) ALWAYS_INLINE {
    int64_t stride;
    const float* k = keys_of<T>(head.k, first, count, depth, k_copy, &stride);
    multiply(k, stride, 1, q_lanes, lanes, count, lanes, depth, logits, lanes, false);
    mask_tile(head, seen, first, count, lanes, logits);
    if (head.drop.scale != 0) keep_tile(head, first, count, lanes, factors);
    weigh_tile(logits, head.drop.scale != 0 ? factors : nullptr, count, lanes, &online, out, depth, is_first);
    is_first = false;
    const float* values = keys_of<T>(head.v, first, count, depth, v_copy, &stride);
    multiply(values, 1, stride, logits, lanes, depth, lanes, count, out, lanes, true);
  });
  finish_rows<T>(work, online, out, lanes, q);
}

int64_t backward_bytes(int64_t depth) {
  const int64_t width = padded(depth);
  return 4 * (LANES_OF_BLOCK * (5 * width + 3 * TILE_KEYS) + 2 * TILE_KEYS * width) + 2048;
}

template <class T>
INLINE void backward_block(const HeadBackward& work, char* memory) {
  const Head& head = work.head;
  const int64_t depth = head.depth, width = padded(depth), lanes = padded(head.rows);
  Scratch scratch = {memory};
  float *q = scratch.take(LANES_OF_BLOCK * width), *q_lanes = scratch.take(LANES_OF_BLOCK * width);
  float *d_out = scratch.take(LANES_OF_BLOCK * width), *d_out_lanes = scratch.take(LANES_OF_BLOCK * width);
  float *dq = scratch.take(LANES_OF_BLOCK * width), *weights = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  float *grads = scratch.take(LANES_OF_BLOCK * TILE_KEYS), *factors = scratch.take(LANES_OF_BLOCK * TILE_KEYS);
  float *k_copy = scratch.take(TILE_KEYS * width), *v_copy = scratch.take(TILE_KEYS * width);
  const int64_t at = head.first_row;
  widen((const T*)head.q.data + at * head.q.stride, head.q.stride, head.rows, depth, head.scale, q);
  transpose(q, width, head.rows, lanes, depth, q_lanes);
  widen((const T*)work.d_out.data + at * work.d_out.stride, work.d_out.stride, head.rows, depth, 1.0f, d_out);
  transpose(d_out, width, head.rows, lanes, depth, d_out_lanes);
  for (int64_t i = 0; i < depth * lanes; i += W) store(dq + i, Vec{}, All{});
  float lse[LANES_OF_BLOCK], delta[LANES_OF_BLOCK];
  rows_of(work, lanes, lse, delta);
  Seen seen;
  look(head, lanes, &seen);
  for_tiles(head, seen, work.first_key, work.last_key, [&](int64_t first, int64_t count) ALWAYS_INLINE {
    int64_t k_stride, v_stride;
    const float* k = keys_of<T>(head.k, first, count, depth, k_copy, &k_stride);
    const float* values = keys_of<T>(head.v, first, count, depth, v_copy, &v_stride);
    multiply(k, k_stride, 1, q_lanes, lanes, count, lanes, depth, weights, lanes, false);
    mask_tile(head, seen, first, count, lanes, weights);
    multiply(values, v_stride, 1, d_out_lanes, lanes, count, lanes, depth, grads, lanes, false);
    if (head.drop.scale != 0) keep_tile(head, first, count, lanes, factors);
    grad_tile(weights, grads, head.drop.scale != 0 ? factors : nullptr, count, lanes, lse, delta, 1.0f);
    const int64_t place = (first - work.first_key) * width;
    multiply(weights, lanes, 1, d_out, width, count, width, head.rows, work.dv + place, width, true);
    multiply(grads, lanes, 1, q, width, count, width, head.rows, work.dk + place, width, true);
    multiply(k, 1, k_stride, grads, lanes, depth, lanes, count, dq, lanes, true);
  });
  for (int64_t i = 0; i < head.rows; ++i)
    for (int64_t d = 0; d < depth; ++d) work.dq[i * depth + d] = dq[d * lanes + i] * head.scale;
}

void forward(const HeadForward& work, char* scratch) {
  switch (work.head.kind) {
    case Kind::float32: return forward_block<float>(work, scratch);
    case Kind::bfloat16: return forward_block<BFloat>(work, scratch);
    case Kind::float16: return forward_block<Half>(work, scratch);
  }
}

void backward(const HeadBackward& work, char* scratch) {
  switch (work.head.kind) {
    case Kind::float32: return backward_block<float>(work, scratch);
    case Kind::bfloat16: return backward_block<BFloat>(work, scratch);
    case Kind::float16: return backward_block<Half>(work, scratch);
  }
}

template <class T>
INLINE void narrow_to(const float* from, int64_t count, T* to) {
  for_vectors(0, count, [&](int64_t i, auto lanes) ALWAYS_INLINE { store(to + i, load(from + i, lanes), lanes); });
}

void narrow(Kind kind, const float* from, int64_t count, void* to) {
  switch (kind) {
    case Kind::float32: return narrow_to(from, count, (float*)to);
    case Kind::bfloat16: return narrow_to(from, count, (BFloat*)to);
    case Kind::float16: return narrow_to(from, count, (Half*)to);
  }
}

}  // namespace

extern const AttentionKernels ATTENTION = {LANES_OF_BLOCK, W, forward_bytes, backward_bytes, forward, backward, narrow};

}  // namespace mmkernels
