// Compiled once for each instruction set, with MULTI_TENSOR the name of its table.
#include "multi_tensor_kernels.h"

#include "simd.h"

namespace mmkernels {
namespace {

// Elements that one call of philox has words for.
constexpr int64_t DRAWN = 4 * W;

struct Nowhere {};

INLINE void store(Nowhere*, Vec, auto) {}

INLINE Nowhere* operator_plus(Nowhere* to, int64_t) { return to; }
template <class T>
INLINE T* operator_plus(T* to, int64_t j) {
  return to + j;
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

template <class Target, class Source, class Shadow>
void ema_nearest(const Ema& work) {
  auto* target = (Target*)work.target;
  auto* source = (const Source*)work.source;
  auto* shadow = (Shadow*)work.shadow;
  for_vectors(0, work.elements, [&](int64_t j, auto lanes) ALWAYS_INLINE {
    const Vec mean = mean_of(load(target + j, lanes), load(source + j, lanes), work.weight);
    store(target + j, mean, lanes);
    store(operator_plus(shadow, j), mean, lanes);
  });
}

template <class Source, class Shadow>
void ema_stochastic(const Ema& work) {
  auto* target = (BFloat*)work.target;
  auto* source = (const Source*)work.source;
  auto* shadow = (Shadow*)work.shadow;
  uint32_t words[4][W], random[DRAWN];
  for (int64_t begin = 0; begin < work.elements; begin += DRAWN) {
    philox((uint32_t)((work.first + begin) / 4), work.number, 0, work.key, words);
    for (int64_t i = 0; i < W; ++i)
      for (int64_t w = 0; w < 4; ++w) random[4 * i + w] = words[w][i];
    const int64_t end = begin + DRAWN < work.elements ? begin + DRAWN : work.elements;
    for_vectors(begin, end, [&](int64_t j, auto lanes) ALWAYS_INLINE {
      const Vec mean = mean_of(load(target + j, lanes), load(source + j, lanes), work.weight);
      store(target + j, stochastic(mean, load<Bits>(random + (j - begin))), lanes);
      store(operator_plus(shadow, j), mean, lanes);
    });
  }
}

// Calls run with a null pointer of the type that the kind has for a list.
template <class Run>
void with_type(int64_t kind, int place, const Run& run) {
  switch (kind >> (2 * place) & 3) {
    case FLOAT: return run((float*)nullptr);
    case HALF: return run((Half*)nullptr);
    case BFLOAT: return run((BFloat*)nullptr);
    default: return run((Nowhere*)nullptr);
  }
}

template <class T>
constexpr bool is_nowhere = __is_same(T, Nowhere);

void ema(const Ema& work) {
  with_type(work.kind, 1, [&]<class Source>(Source*) {
    with_type(work.kind, 2, [&]<class Shadow>(Shadow*) {
      if constexpr (!is_nowhere<Source>) {
        if (work.stochastic) return ema_stochastic<Source, Shadow>(work);
        with_type(work.kind, 0, [&]<class Target>(Target*) {
          if constexpr (!is_nowhere<Target>) ema_nearest<Target, Source, Shadow>(work);
        });
      }
    });
  });
}

}  // namespace

extern const MultiTensorKernels MULTI_TENSOR = {ema};

}  // namespace mmkernels
