// Vectors of float32 for whichever instruction set the file that includes this is compiled for.
//
// Everything is in an anonymous namespace and no standard header with inline functions is included: the linker
// could take another set's copy of one.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__FMA__)
// g++ 12 calls the undefined operands of its own intrinsics uninitialized
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
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
constexpr float INF = __builtin_inff();

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
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
INLINE Longs load(const int64_t* from, All) { return load<Longs>(from); }
INLINE Longs load(const int64_t* from, First lanes) {
  return load<Longs>(from, lanes.count * sizeof(int64_t));
}

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

struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

INLINE Halves load_bits(const void* from, All) { return load<Halves>(from); }
INLINE Halves load_bits(const void* from, First lanes) { return load<Halves>(from, lanes.count * sizeof(uint16_t)); }

INLINE Vec load(const BFloat* from, auto lanes) {
  return (Vec)(__builtin_convertvector(load_bits(from, lanes), Bits) << 16);
}

INLINE void store(BFloat* to, Vec x, auto lanes) { store((uint16_t*)to, x, lanes); }

INLINE Vec load(const Half* from, auto lanes) {
  const Halves halves = load_bits(from, lanes);
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)halves);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)halves);
#else
  const Bits bits = __builtin_convertvector(halves, Bits);
  const Bits size = (bits & 0x7fff) << 13;
  const Bits finite = (Bits)((Vec)size * 0x1p112f);
  return (Vec)(((bits & 0x8000) << 16) | (size >= 0x7c00u << 13 ? size | 0x7f800000 : finite));
#endif
}

// float16, rounded to nearest even.
INLINE void store(Half* to, Vec x, auto lanes) {
#if defined(__AVX512F__)
  const Halves halves = (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const Halves halves = (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits sign = ((Bits)x >> 16) & 0x8000, size = (Bits)x & 0x7fffffff;
  const Bits normal = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
  // of less than 2^-14 the last place is 2^-24, which is that of a sum with a half
  const Bits faint = (Bits)((Vec)size + 0.5f) - 0x3f000000;
  Bits bits = size < 0x38800000u ? faint : normal;
  bits = size >= 0x477ff000u ? (size > 0x7f800000u ? Bits{} + 0x7e00 : Bits{} + 0x7c00) : bits;
  const Halves halves = __builtin_convertvector(sign | bits, Halves);
#endif
  put((uint16_t*)to, halves, lanes);
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

INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__aarch64__)
  return vsqrtq_f32(x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
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

// log(1 + t) of 0 <= t <= 1, within 1.5 ulp.
INLINE Vec log1p(Vec t) {
  // log1p(t) / t, minimax: 3e-8
  Vec p = fma(t, splat(0x1.5f96cap-8f), splat(-0x1.ec990cp-6f));
  p = fma(p, t, splat(0x1.446bf6p-4f));
  p = fma(p, t, splat(-0x1.19ad88p-3f));
  p = fma(p, t, splat(0x1.884450p-3f));
  p = fma(p, t, splat(-0x1.fd1320p-3f));
  p = fma(p, t, splat(0x1.5535dap-2f));
  p = fma(p, t, splat(-0x1.ffff14p-2f));
  return fma(p, t, splat(1)) * t;
}

// The upper 32 bits of products of 32-bit numbers.
INLINE Bits upper(Bits x, uint32_t factor) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32((int32_t)factor), v = (__m512i)x;
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(v, f), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), f);
  return (Bits)_mm512_mask_blend_epi32(0xaaaa, even, odd);
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32((int32_t)factor), v = (__m256i)x;
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(v, f), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), f);
  return (Bits)_mm256_blend_epi32(even, odd, 0xaa);
#else
  for (int i = 0; i < W; ++i) x[i] = (uint32_t)((uint64_t)x[i] * factor >> 32);
  return x;
#endif
}

// Philox-4x32-10 of W counters (c0, c1, c2, 0): word w of all of them.
INLINE void philox(Bits c0, Bits c1, Bits c2, uint64_t key, Bits* words) {
  Bits c3{};
  uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Bits high0 = upper(c0, 0xD2511F53), high1 = upper(c2, 0xCD9E8D57);
    const Bits low0 = c0 * 0xD2511F53u, low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The same of the counters (first + i, second, third, 0): words[w][i].
INLINE void philox(uint32_t first, uint32_t second, uint32_t third, uint64_t key, uint32_t (*words)[W]) {
  Bits found[4];
  philox((Bits)iota() + first, second + Bits{}, third + Bits{}, key, found);
  for (int w = 0; w < 4; ++w) put(words[w], found[w], All{});
}

INLINE float maximum(Vec x) {
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

INLINE Doubles widened(Vec x) { return __builtin_convertvector(x, Doubles); }

INLINE double sum(Doubles x) {
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

INLINE double sum(Vec x) { return sum(widened(x)); }

}  // namespace
}  // namespace mmkernels
