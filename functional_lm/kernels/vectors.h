// Vectors of 16 numbers, in the compiler's own form (GCC, clang), so that one source serves every processor.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WIDE = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(64)));

template <typename V, typename T>
inline V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const float* p) { return read<Floats>(p); }

#ifdef __AVX512F__  // what GCC 12 makes of the conversions below is many times slower

inline Floats load(const c10::BFloat16* p) {  // the upper half of a float32
  const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
}

inline Integers whole_pairs(const int8_t* p) {
  return (Integers)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#else

inline Floats load(const c10::BFloat16* p) {
  const Words word = __builtin_convertvector(read<Halves>(p), Words) << 16;
  return read<Floats>(&word);
}

inline Integers whole_pairs(const int8_t* p) {
  const Shorts pairs = __builtin_convertvector(read<Bytes>(p), Shorts);
  return read<Integers>(&pairs);
}

#endif

inline void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }

inline void store(c10::BFloat16* p, const Floats& v) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  for (int64_t i = 0; i < WIDE; ++i) p[i] = static_cast<c10::BFloat16>(v[i]);
#endif
}

// Sums of four vectors at once, each in the same order: neighbours, neighbours of these, quarters.
#ifdef __AVX512F__

inline Four totals(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
  const __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
  const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 all = (__m512)low + (__m512)high;
  const __m256 half = _mm512_castps512_ps256(all) + (__m256)_mm512_extractf64x4_pd((__m512d)all, 1);
  return (Four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}

#else

inline float quarters(const Floats& v) {
  float part[4];
  for (int i = 0; i < 4; ++i) part[i] = (v[4 * i] + v[4 * i + 2]) + (v[4 * i + 1] + v[4 * i + 3]);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

inline Four totals(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
  return Four{quarters(a), quarters(b), quarters(c), quarters(d)};
}

#endif

inline float total(const Floats& v) { return totals(v, Floats{}, Floats{}, Floats{})[0]; }

}  // namespace
