// Compiled once for each instruction set, with MULTI_TENSOR the name of its table.
#include "multi_tensor_kernels.h"

#include "simd.h"

namespace mmkernels {
namespace {

// Elements that one call of philox has words for.
constexpr int64_t DRAWN = 4 * W;
// Elements of a list that are held as float32 at a time, where they are stored as something else.
constexpr int64_t BLOCK = 512;
// Floats between one that is read and one that is asked for: a quarter less time than without, where one list is read.
constexpr int64_t AHEAD = 1024;
// A sum of a chunk's squares above which those that vanish in float32 do not count.
constexpr double LEAST_SQUARES = 1e-26;

template <class T>
INLINE void widen(const void* from, int64_t first, float* to, int64_t n) {
  for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE { store(to + j, load((const T*)from + first + j, lanes), lanes); });
}

template <class T>
INLINE void narrow(const float* from, void* to, int64_t first, int64_t n) {
  for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE { store((T*)to + first + j, load(from + j, lanes), lanes); });
}

// Calls body(lists, first, n) for each block, with float32 pointers to the lists' parts, null where there is no list.
// What is not float32 is widened before, if it is read, and narrowed after, if it is written: bits of `reads`, `writes`.
template <int LISTS, class Body>
INLINE void for_blocks(const Chunk& chunk, int reads, int writes, Body&& body) {
  float held[LISTS][BLOCK];
  for (int64_t first = 0; first < chunk.elements; first += BLOCK) {
    const int64_t n = chunk.elements - first < BLOCK ? chunk.elements - first : BLOCK;
    float* lists[LISTS];
    for (int i = 0; i < LISTS; ++i) {
      const int64_t dtype = chunk.kind >> (3 * i) & 7;
      lists[i] = dtype == NONE ? nullptr : dtype == FLOAT ? (float*)chunk.lists[i] + first : held[i];
      if (!(reads >> i & 1)) continue;
      if (dtype == HALF) widen<Half>(chunk.lists[i], first, held[i], n);
      if (dtype == BFLOAT) widen<BFloat>(chunk.lists[i], first, held[i], n);
    }
    body(lists, first, n);
    for (int i = 0; i < LISTS; ++i) {
      const int64_t dtype = chunk.kind >> (3 * i) & 7;
      if (!(writes >> i & 1)) continue;
      if (dtype == HALF) narrow<Half>(held[i], chunk.lists[i], first, n);
      if (dtype == BFLOAT) narrow<BFloat>(held[i], chunk.lists[i], first, n);
    }
  }
}

INLINE Vec mean_of(Vec target, Vec source, float weight) {
  const Vec step = source - target;
  return weight < 0.5f ? target + weight * step : source - (1 - weight) * step;
}

// Cut to bfloat16's bits, rounded up by the lower 16 of the random ones; what is not finite stays.
INLINE Vec stochastic(Vec x, Bits random) {
  const Vec up = (Vec)(((Bits)x + (random & 0xffff)) & 0xffff0000u);
  return x - x == 0 ? up : x;
}

void round_stochastically(float* x, int64_t n, uint64_t key, int64_t number, int64_t first) {
  uint32_t words[4][W], random[DRAWN];
  for (int64_t begin = 0; begin < n; begin += DRAWN) {
    philox((uint32_t)((first + begin) / 4), (uint32_t)number, 0, key, words);
    for (int64_t i = 0; i < W; ++i)
      for (int64_t w = 0; w < 4; ++w) random[4 * i + w] = words[w][i];
    for_vectors(begin, begin + DRAWN < n ? begin + DRAWN : n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      store(x + j, stochastic(load(x + j, lanes), load<Bits>(random + (j - begin))), lanes);
    });
  }
}

void ema(const Chunk& chunk, const Ema& by) {
  for_blocks<3>(chunk, 0b011, 0b101, [&](float** lists, int64_t first, int64_t n) ALWAYS_INLINE {
    auto [target, source, shadow] = (float* (&)[3])*lists;
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec mean = mean_of(load(target + j, lanes), load(source + j, lanes), by.weight);
      store(target + j, mean, lanes);
      if (shadow) store(shadow + j, mean, lanes);
    });
    if (by.stochastic) round_stochastically(target, n, by.key, chunk.number, chunk.first + first);
  });
}

void adamw(const Chunk& chunk, const AdamW& by) {
  for_blocks<7>(chunk, 0b0011111, 0b1111101, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    auto [param, grad, exp_avg, exp_avg_sq, average, copy, shadow] = (float* (&)[7])*lists;
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec g = load(grad + j, lanes);
      const Vec m = mean_of(load(exp_avg + j, lanes), g, by.rise);
      const Vec v = by.beta2 * load(exp_avg_sq + j, lanes) + by.fall * g * g;
      Vec p = by.keep * load(param + j, lanes) - by.step * m / (by.root * sqrt(v) + by.eps);
      // comparisons that a NaN passes
      p = p < by.low ? splat(by.low) : p > by.high ? splat(by.high) : p;
      store(exp_avg + j, m, lanes);
      store(exp_avg_sq + j, v, lanes);
      store(param + j, p, lanes);
      if (copy) store(copy + j, p, lanes);
      if (!average) return;
      const Vec mean = mean_of(load(average + j, lanes), p, by.weight);
      store(average + j, mean, lanes);
      if (shadow) store(shadow + j, mean, lanes);
    });
  });
}

// In float32 by blocks, unless a square overflows or those that count vanish.
double squares(const Chunk& chunk) {
  Doubles total{};
  for_blocks<1>(chunk, 0b1, 0b0, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    const float* x = lists[0];
    // four in turn, since each waits for its last
    Vec sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) {
      for (int64_t i = 0; i < 4 * W; i += 16) __builtin_prefetch(x + j + i + AHEAD);
      for (int64_t i = 0; i < 4; ++i) sums[i] += load(x + j + i * W, All{}) * load(x + j + i * W, All{});
    }
    for_vectors(j, n, [&](int64_t j, auto lanes) ALWAYS_INLINE { sums[0] += load(x + j, lanes) * load(x + j, lanes); });
    total += widened((sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  if (sum(total) > LEAST_SQUARES && sum(total) < INF) return sum(total);
  total = Doubles{};
  for_blocks<1>(chunk, 0b1, 0b0, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      total += widened(load(lists[0] + j, lanes)) * widened(load(lists[0] + j, lanes));
    });
  });
  return sum(total);
}

void scale(const Chunk& chunk, float by) {
  for_blocks<1>(chunk, 0b1, 0b1, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      store(lists[0] + j, by * load(lists[0] + j, lanes), lanes);
    });
  });
}

void fisher(const Chunk& chunk, const Fisher& by) {
  for_blocks<2>(chunk, 0b11, 0b01, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec g = load(lists[1] + j, lanes);
      store(lists[0] + j, by.decay * load(lists[0] + j, lanes) + by.weight * g * g, lanes);
    });
  });
}

double ewc(const Chunk& chunk) {
  Doubles total{};
  for_blocks<3>(chunk, 0b111, 0b000, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Doubles step = widened(load(lists[0] + j, lanes) - load(lists[1] + j, lanes));
      total += widened(load(lists[2] + j, lanes)) * step * step;
    });
  });
  return sum(total);
}

void ewc_grad(const Chunk& chunk, float factor) {
  for_blocks<4>(chunk, 0b0111, 0b1000, [&](float** lists, int64_t, int64_t n) ALWAYS_INLINE {
    for_vectors(0, n, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec step = load(lists[0] + j, lanes) - load(lists[1] + j, lanes);
      store(lists[3] + j, factor * load(lists[2] + j, lanes) * step, lanes);
    });
  });
}

// Bits, so that what is kept is the same whatever it is; a block that is kept whole is not touched.
template <class T>
INLINE void keep(T* bits, const uint8_t* mask, int64_t n, const Owners& by) {
  const uint8_t span = by.last - by.first;
  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t end = n - first < BLOCK ? n : first + BLOCK;
    uint8_t any = 0;
    for (int64_t j = first; j < end; ++j) any |= (uint8_t)(mask[j] - by.first) > span;
    if (!any) continue;
    for (int64_t j = first; j < end; ++j) bits[j] = (uint8_t)(mask[j] - by.first) > span ? 0 : bits[j];
  }
}

void masks(const Chunk& chunk, const Owners& by) {
  const uint8_t* mask = (const uint8_t*)chunk.lists[1];
  if ((chunk.kind & 7) == FLOAT)
    keep((uint32_t*)chunk.lists[0], mask, chunk.elements, by);
  else
    keep((uint16_t*)chunk.lists[0], mask, chunk.elements, by);
}

}  // namespace

extern const MultiTensorKernels MULTI_TENSOR = {ema, adamw, squares, scale, fisher, ewc, ewc_grad, masks};

}  // namespace mmkernels
