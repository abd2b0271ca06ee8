// Decoding's two products at the speed of the memory: few rows times a matrix, and attention over the filled cache rows.
//
// Every sum is in float32 and in an order of its own that depends neither on the number of rows nor on the threads: what
// a sequence says is the same to the last bit whatever company it is in. Vectors are the compiler's (GCC, clang), of 16
// numbers, so that one source serves every processor.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WIDE = 16;
constexpr int BLOCK = 4;
typedef float Floats __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#ifdef __AVX512F__  // what GCC 12 makes of the conversions below is many times slower

inline Floats load(const c10::BFloat16* p) {  // the upper half of a float32
  const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
}

inline Floats load(const int8_t* p) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#else

inline Floats load(const c10::BFloat16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  const Words word = __builtin_convertvector(half, Words) << 16;
  Floats v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}

inline Floats load(const int8_t* p) {
  Bytes byte;
  std::memcpy(&byte, p, sizeof byte);
  return __builtin_convertvector(__builtin_convertvector(byte, Integers), Floats);
}

#endif

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

// One step along the inputs: how many numbers, what is loaded, and what is added to 16 lanes of sums. Where the processor
// adds up pairs of bfloat16 products (rows in bfloat16, and whole numbers up to 127, which are exact in it) a step is 32.
template <typename W, typename X>
struct Step {
  static constexpr int64_t size = WIDE;
  typedef float Row;
  typedef Floats In;
  static In in(const Row* p) { return load(p); }
  static In weight(const W* p) { return load(p); }
  static Floats add(Floats sum, In w, In x) { return sum + w * x; }
};

#ifdef __AVX512BF16__

inline __m512bh pairs(const c10::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh pairs(const int8_t* p) {
  return _mm512_cvtne2ps_pbh((__m512)load(p + WIDE), (__m512)load(p));
}

template <typename W>
struct Pairs {
  static constexpr int64_t size = 2 * WIDE;
  typedef c10::BFloat16 Row;
  typedef __m512bh In;
  static In in(const Row* p) { return pairs(p); }
  static In weight(const W* p) { return pairs(p); }
  static Floats add(Floats sum, In w, In x) { return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x); }
};

template <>
struct Step<c10::BFloat16, c10::BFloat16> : Pairs<c10::BFloat16> {};
template <>
struct Step<int8_t, c10::BFloat16> : Pairs<int8_t> {};

#endif

// R rows of the matrix times M rows of x. A sum is a chain of 16 lanes, in the same order whatever R and M are.
template <int R, int M, typename P, typename W>
inline void tile(const W* w, const typename P::Row* x, int64_t inputs, float (&sums)[R][M]) {
  Floats lanes[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) lanes[r][m] = Floats{};
  for (int64_t k = 0; k < inputs; k += P::size) {
    typename P::In in[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) in[m] = P::in(x + m * inputs + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w + (R + r) * inputs + k);  // of the next tile: several rows at once hide it from the hardware
      const typename P::In row = P::weight(w + r * inputs + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) lanes[r][m] = P::add(lanes[r][m], row, in[m]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 4) {
      Floats four[4] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4 && m + i < M; ++i) four[i] = lanes[r][m + i];
      const Four sum = totals(four[0], four[1], four[2], four[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4 && m + i < M; ++i) sums[r][m + i] = sum[i];
    }
}

template <int R, int M, typename W, typename X, typename S>
inline void put(
    const W* w, const S* scales, const typename Step<W, X>::Row* x, X* y, int64_t n, int64_t m, int64_t inputs,
    int64_t outputs) {
  float sums[R][M];
  tile<R, M, Step<W, X>>(w + n * inputs, x + m * inputs, inputs, sums);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < M; ++i)
      y[(m + i) * outputs + n + r] = static_cast<X>(scales ? sums[r][i] * static_cast<float>(scales[n + r]) : sums[r][i]);
}

template <int R, typename W, typename X, typename S>
inline void all(
    const W* w, const S* scales, const typename Step<W, X>::Row* x, X* y, int64_t n, int64_t rows, int64_t inputs,
    int64_t outputs) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) put<R, 4>(w, scales, x, y, n, m, inputs, outputs);
  for (; m + 2 <= rows; m += 2) put<R, 2>(w, scales, x, y, n, m, inputs, outputs);
  if (m < rows) put<R, 1>(w, scales, x, y, n, m, inputs, outputs);
}

template <typename W, typename X, typename S>
void multiply(
    const W* w, const S* scales, const X* x, X* y, int64_t rows, int64_t inputs, int64_t outputs) {
  typedef typename Step<W, X>::Row Row;
  std::vector<Row> wide(std::is_same_v<Row, X> ? 0 : rows * inputs);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<Row>(x[i]);
  const Row* in = wide.empty() ? reinterpret_cast<const Row*>(x) : wide.data();
  const int64_t grain = std::max<int64_t>(2, 131072 / (rows * inputs + 1));
  at::parallel_for(0, outputs, grain, [&](int64_t n, int64_t end) {
    // Where little is computed with a number the matrix is best read from its beginning to its end; else several of its
    // rows at a time save loads, and hide how long a sum of int8 takes.
    if (rows > 4 || sizeof(W) == 1)
      for (; n + BLOCK <= end; n += BLOCK) all<BLOCK>(w, scales, in, y, n, rows, inputs, outputs);
    for (; n < end; ++n) all<1>(w, scales, in, y, n, rows, inputs, outputs);
  });
}

template <typename X>
void multiply_by(const at::Tensor& weight, const std::optional<at::Tensor>& scales, const X* x, X* y, int64_t rows) {
  const int64_t inputs = weight.size(1), outputs = weight.size(0);
  if (weight.scalar_type() == at::kChar && scales->scalar_type() == at::kFloat)
    multiply(weight.const_data_ptr<int8_t>(), scales->const_data_ptr<float>(), x, y, rows, inputs, outputs);
  else if (weight.scalar_type() == at::kChar)
    multiply(weight.const_data_ptr<int8_t>(), scales->const_data_ptr<at::BFloat16>(), x, y, rows, inputs, outputs);
  else if (weight.scalar_type() == at::kBFloat16)
    multiply(weight.const_data_ptr<at::BFloat16>(), static_cast<const float*>(nullptr), x, y, rows, inputs, outputs);
  else
    multiply(weight.const_data_ptr<float>(), static_cast<const float*>(nullptr), x, y, rows, inputs, outputs);
}

// x [M, in] times the transpose of weight [out, in] (float32, bfloat16, or int8 with scales [out]).
at::Tensor few_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  TORCH_CHECK(weight.is_contiguous() && weight.size(1) % (2 * WIDE) == 0, "few_rows: a contiguous matrix of 32 n inputs");
  const at::Tensor rows = x.contiguous();
  const at::Tensor y = at::empty({rows.size(0), weight.size(0)}, rows.options());
  if (rows.scalar_type() == at::kBFloat16)
    multiply_by(weight, scales, rows.const_data_ptr<at::BFloat16>(), y.mutable_data_ptr<at::BFloat16>(), rows.size(0));
  else
    multiply_by(weight, scales, rows.const_data_ptr<float>(), y.mutable_data_ptr<float>(), rows.size(0));
  return y;
}

// e^x for x <= 0: 2^n by the exponent's bits, the rest by a polynomial of degree 6.
inline Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.0f;
  x = x < low ? low : x;
  const Floats scaled = x * 1.44269504f;
  const Integers n = __builtin_convertvector(scaled - 0.5f, Integers);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats y = Floats{} + 1.3888889e-3f;
  for (const float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) y = y * r + c;
  const Integers bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

// One query head over rows [first, last) of one slot's keys and values; N vectors of 16 a row.
template <int N, typename T>
void attend(const T* q, const T* k, const T* v, T* y, int64_t first, int64_t last, std::vector<float>& weights) {
  constexpr int64_t width = N * WIDE;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Floats query[N];
  for (int i = 0; i < N; ++i) query[i] = load(q + i * WIDE) * scale;
  const int64_t count = last - first, padded = (count + WIDE - 1) / WIDE * WIDE;
  weights.assign(padded, -INFINITY);
  float most = -INFINITY;
  for (int64_t c = 0; c < count; ++c) {
    Floats sum{};
    for (int i = 0; i < N; ++i) sum += query[i] * load(k + (first + c) * width + i * WIDE);
    weights[c] = total(sum);
    most = std::max(most, weights[c]);
  }
  Floats sums{};
  for (int64_t c = 0; c < padded; c += WIDE) {
    Floats e = exponential(load(weights.data() + c) - most);
    for (int64_t i = 0; i < WIDE; ++i)
      if (c + i >= count) e[i] = 0;
    sums += e;
    std::memcpy(weights.data() + c, &e, sizeof e);
  }
  Floats out[N];
  for (int i = 0; i < N; ++i) out[i] = Floats{};
  for (int64_t c = 0; c < count; ++c)
    for (int i = 0; i < N; ++i) out[i] += weights[c] * load(v + (first + c) * width + i * WIDE);
  const float norm = 1.0f / total(sums);
  for (int i = 0; i < N; ++i)
    for (int64_t e = 0; e < WIDE; ++e) y[i * WIDE + e] = static_cast<T>(out[i][e] * norm);
}

template <typename T>
void attend_all(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions, int64_t window,
    const at::Tensor& y) {
  const int64_t heads = q.size(1), shared = k.size(1), length = k.size(2), width = k.size(3);
  const T *query = q.const_data_ptr<T>(), *key = k.const_data_ptr<T>(), *value = v.const_data_ptr<T>();
  T* result = y.mutable_data_ptr<T>();
  const int64_t* at = positions.const_data_ptr<int64_t>();
  at::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weights;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = i / heads, head = i % heads / (heads / shared);
      const int64_t last = std::min(length, at[slot] + 1);
      const int64_t first = window ? std::max<int64_t>(0, last - window) : 0;
      const int64_t rows = (slot * shared + head) * length * width;
      const auto one = [&](auto n) {
        attend<decltype(n)::value>(
            query + i * width, key + rows, value + rows, result + i * width, first, last, weights);
      };
      switch (width / WIDE) {
        case 1: one(std::integral_constant<int, 1>{}); break;
        case 2: one(std::integral_constant<int, 2>{}); break;
        case 3: one(std::integral_constant<int, 3>{}); break;
        case 4: one(std::integral_constant<int, 4>{}); break;
        case 5: one(std::integral_constant<int, 5>{}); break;
        case 6: one(std::integral_constant<int, 6>{}); break;
        case 7: one(std::integral_constant<int, 7>{}); break;
        case 8: one(std::integral_constant<int, 8>{}); break;
        case 16: one(std::integral_constant<int, 16>{}); break;
        default: TORCH_CHECK(false, "filled_rows: heads of 16 n numbers, up to 128, or of 256");
      }
    }
  });
}

// Attention of one query a slot, [S, H, E], over the rows 0..positions[s] of its cache [S, K, C, E].
at::Tensor filled_rows(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& positions,
    int64_t window) {
  TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), "filled_rows: a contiguous cache");
  const at::Tensor q = query.contiguous(), where = positions.contiguous();
  const at::Tensor y = at::empty(q.sizes(), q.options());
  if (q.scalar_type() == at::kBFloat16)
    attend_all<at::BFloat16>(q, key, value, where, window, y);
  else
    attend_all<float>(q, key, value, where, window, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(functional_lm, CPU, library) {
  library.impl("few_rows", &few_rows);
  library.impl("filled_rows", &filled_rows);
}
