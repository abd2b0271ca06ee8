// Decoding's two products at the speed of the memory: rows times a matrix, and attention over the filled cache rows.
//
// A matrix lies in blocks of 32 outputs, and in a block the numbers of one input (or of two neighbours) side by side: it
// is read from its beginning to its end once a call, and a vector of it is multiplied with one number (or pair) of a row.
// So every sum is a chain of its own along the inputs, whatever the number of rows and of threads: what a sequence says is
// the same to the last bit whatever company it is in. Where a processor has an instruction for pairs it is taken.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 32;      // outputs of a block
constexpr int64_t AHEAD = 4096;    // bytes that are asked for before they are needed (measured)
constexpr int64_t NEXT = 16;       // cache rows that are
constexpr int64_t WHOLE = 127;     // the largest whole number of a quantised matrix

// A product of a number of a row with 16 outputs, by what the matrix (W) and the rows (X) hold: what is loaded of a block,
// what of a row, and how it is added up. `pair` numbers of an input stand side by side.

template <typename W, typename X>
struct Step;

template <typename X>
struct Step<float, X> {
  static constexpr int64_t pair = 1;
  typedef float Row;
  typedef Floats In, Sum;
  static In weight(const float* p) { return load(p); }
  static Sum add(Sum sum, const In& w, const Row* x) { return sum + w * *x; }
};

template <typename X>
struct Step<c10::BFloat16, X> {  // rows in float32: both numbers of a pair, widened
  static constexpr int64_t pair = 2;
  typedef float Row;
  typedef Words In;
  typedef Floats Sum;
  static In weight(const c10::BFloat16* p) { return read<Words>(p); }
  static Sum add(Sum sum, const In& w, const Row* x) {
    const Words low = w << 16, high = w & 0xffff0000u;
    return sum + read<Floats>(&low) * x[0] + read<Floats>(&high) * x[1];
  }
};

#ifdef __AVX512BF16__

template <>
struct Step<c10::BFloat16, c10::BFloat16> {
  static constexpr int64_t pair = 2;
  typedef c10::BFloat16 Row;
  typedef __m512i In;
  typedef Floats Sum;
  static In weight(const c10::BFloat16* p) { return _mm512_loadu_si512(p); }
  static Sum add(Sum sum, const In& w, const Row* x) {
    const __m512i both = _mm512_set1_epi32(read<int32_t>(x));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)both);
  }
};

#endif

template <typename X>
struct Step<int8_t, X> {  // rows of whole numbers too (see `whole`): the sums are exact
  static constexpr int64_t pair = 2;
  typedef int16_t Row;
  typedef Integers In, Sum;
  static In weight(const int8_t* p) { return whole_pairs(p); }
  static Sum add(const Sum& sum, const In& w, const Row* x) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(read<int32_t>(x)));
#elif defined(__AVX512BW__)
    return sum + (Integers)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(read<int32_t>(x)));
#else
    return sum + ((w << 16) >> 16) * x[0] + (w >> 16) * x[1];
#endif
  }
};

// One block times M rows of x.
template <int M, typename P, typename W>
inline void tile(const W* block, const typename P::Row* x, int64_t inputs, typename P::Sum (&sums)[M][2]) {
  typename P::Sum lanes[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) lanes[m][0] = lanes[m][1] = typename P::Sum{};
  for (int64_t k = 0; k < inputs; k += P::pair) {
    const W* here = block + k * BLOCK;
    __builtin_prefetch(reinterpret_cast<const char*>(here) + AHEAD);
    if (sizeof(W) * P::pair * BLOCK > 64) __builtin_prefetch(reinterpret_cast<const char*>(here) + AHEAD + 64);
    const typename P::In first = P::weight(here), second = P::weight(here + WIDE * P::pair);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      lanes[m][0] = P::add(lanes[m][0], first, x + m * inputs + k);
      lanes[m][1] = P::add(lanes[m][1], second, x + m * inputs + k);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m][0] = lanes[m][0], sums[m][1] = lanes[m][1];
}

// The numbers of up to 32 outputs; `count` of them belong to the matrix.
template <typename X>
inline void put(X* y, const Floats (&sums)[2], int64_t count) {
  if (count >= BLOCK) {
    store(y, sums[0]);
    store(y + WIDE, sums[1]);
    return;
  }
  X part[BLOCK];
  store(part, sums[0]);
  store(part + WIDE, sums[1]);
  std::copy(part, part + count, y);
}

template <typename S>
inline Floats scaled(const Floats& sum, const S*, float) {
  return sum;
}

template <typename S>
inline Floats scaled(const Integers& sum, const S* scales, float own) {
  return __builtin_convertvector(sum, Floats) * (load(scales) * own);
}

template <int M, typename W, typename X, typename S>
inline void rows_of(
    const W* block, const S* scales, const float* own, const typename Step<W, X>::Row* x, X* y, int64_t inputs,
    int64_t outputs, int64_t count) {
  typedef Step<W, X> P;
  typename P::Sum sums[M][2];
  tile<M, P>(block, x, inputs, sums);
  for (int m = 0; m < M; ++m) {
    const float factor = own ? own[m] : 1.0f;
    const Floats both[2] = {scaled(sums[m][0], scales, factor), scaled(sums[m][1], scales + WIDE, factor)};
    put(y + m * outputs, both, count);
  }
}

template <typename W, typename X, typename S>
void multiply(
    const W* blocks, const S* scales, const float* own, const typename Step<W, X>::Row* x, X* y, int64_t rows,
    int64_t inputs, int64_t outputs) {
  const int64_t count = (outputs + BLOCK - 1) / BLOCK, grain = std::max<int64_t>(1, 131072 / (rows * inputs * BLOCK + 1));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const W* block = blocks + n * BLOCK * inputs;
      const S* by = scales ? scales + n * BLOCK : nullptr;
      const auto some = [&](auto m, int64_t at) {
        rows_of<decltype(m)::value, W, X>(
            block, by, own ? own + at : nullptr, x + at * inputs, y + at * outputs + n * BLOCK, inputs, outputs,
            outputs - n * BLOCK);
      };
      int64_t at = 0;
      for (; at + 8 <= rows; at += 8) some(std::integral_constant<int, 8>{}, at);
      for (; at + 4 <= rows; at += 4) some(std::integral_constant<int, 4>{}, at);
      for (; at + 2 <= rows; at += 2) some(std::integral_constant<int, 2>{}, at);
      if (at < rows) some(std::integral_constant<int, 1>{}, at);
    }
  });
}

// Rows as whole numbers, as large as sums of `inputs` products with a matrix of numbers up to 127 allow; and the scales.
template <typename X>
void whole(const X* x, int16_t* numbers, float* own, int64_t rows, int64_t inputs) {
  const float limit = static_cast<float>(std::min<int64_t>(32767, INT32_MAX / (WHOLE * inputs)));
  for (int64_t m = 0; m < rows; ++m, x += inputs, numbers += inputs) {
    float most = 0, sum = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      const float value = static_cast<float>(x[k]);
      most = std::max(most, std::abs(value));
      sum += value;  // finds what is not finite, which `max` passes over
    }
    const bool finite = std::isfinite(sum) && std::isfinite(most);
    own[m] = finite ? most / limit : NAN;
    const float by = finite && most > 0 ? limit / most : 0.0f;
    for (int64_t k = 0; k < inputs; ++k)
      numbers[k] = static_cast<int16_t>(by == 0.0f ? 0.0f : std::nearbyint(static_cast<float>(x[k]) * by));
  }
}

template <typename W, typename X, typename S>
void product_of(const at::Tensor& x, const at::Tensor& blocks, const S* scales, at::Tensor& y) {
  typedef typename Step<W, X>::Row Row;
  const int64_t rows = x.size(0), inputs = x.size(1);
  const W* w = blocks.const_data_ptr<W>();
  const X* in = x.const_data_ptr<X>();
  X* out = y.mutable_data_ptr<X>();
  if constexpr (std::is_same_v<Row, X>) {
    multiply<W, X>(w, scales, nullptr, in, out, rows, inputs, y.size(1));
  } else if constexpr (std::is_same_v<Row, int16_t>) {
    std::vector<int16_t> numbers(rows * inputs);
    std::vector<float> own(rows);
    whole(in, numbers.data(), own.data(), rows, inputs);
    multiply<W, X>(w, scales, own.data(), numbers.data(), out, rows, inputs, y.size(1));
  } else {
    const std::vector<Row> wide(in, in + rows * inputs);
    multiply<W, X>(w, scales, nullptr, wide.data(), out, rows, inputs, y.size(1));
  }
}

template <typename X>
void product_by(
    const at::Tensor& x, const at::Tensor& blocks, const std::optional<at::Tensor>& scales, at::Tensor& y) {
  constexpr const float* none = nullptr;
  if (blocks.scalar_type() == at::kChar && scales->scalar_type() == at::kFloat)
    product_of<int8_t, X>(x, blocks, scales->const_data_ptr<float>(), y);
  else if (blocks.scalar_type() == at::kChar)
    product_of<int8_t, X>(x, blocks, scales->const_data_ptr<c10::BFloat16>(), y);
  else if (blocks.scalar_type() == at::kBFloat16)
    product_of<c10::BFloat16, X>(x, blocks, none, y);
  else
    product_of<float, X>(x, blocks, none, y);
}

// x [M, in] times the transpose of a matrix [out, in] in blocks: float32 [n, in, 32, 1], bfloat16 [n, in/2, 32, 2], or
// int8 [n, in/2, 32, 2] with scales [32 n].
at::Tensor product(
    const at::Tensor& x, const at::Tensor& blocks, const std::optional<at::Tensor>& scales, int64_t outputs) {
  TORCH_CHECK(blocks.is_contiguous() && blocks.dim() == 4 && blocks.size(2) == BLOCK, "product: blocks of 32 outputs");
  TORCH_CHECK(blocks.size(1) * blocks.size(3) == x.size(1), "product: as many inputs as the matrix has");
  TORCH_CHECK((outputs + BLOCK - 1) / BLOCK == blocks.size(0), "product: as many outputs as the blocks have");
  TORCH_CHECK(blocks.size(3) == (blocks.scalar_type() == at::kFloat ? 1 : 2), "product: float32 alone, others in pairs");
  TORCH_CHECK(
      blocks.scalar_type() != at::kChar || (scales && scales->numel() == BLOCK * blocks.size(0)),
      "product: a scale for each output of the blocks");
  const at::Tensor rows = x.contiguous();
  at::Tensor y = at::empty({rows.size(0), outputs}, rows.options());
  if (rows.scalar_type() == at::kBFloat16)
    product_by<c10::BFloat16>(rows, blocks, scales, y);
  else
    product_by<float>(rows, blocks, scales, y);
  return y;
}

// Attention ------------------------------------------------------------------------------------------------------------

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

// Ask for a row of N vectors before it is needed: what is read once and in short pieces, the hardware does not foresee.
template <int N, typename T>
inline void ask(const T* row) {
  for (int64_t i = 0; i < N * WIDE; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// One query head over rows [first, last) of one slot's keys and values; N vectors of 16 a row. `next`: the keys that are
// read afterwards.
template <int N, typename T>
void attend(
    const T* q, const T* k, const T* v, T* y, int64_t first, int64_t last, const T* next, std::vector<float>& weights) {
  constexpr int64_t width = N * WIDE;
  const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Floats query[N];
  for (int i = 0; i < N; ++i) query[i] = load(q + i * WIDE) * scale;
  const int64_t count = last - first, padded = (count + WIDE - 1) / WIDE * WIDE;
  weights.assign(padded, -INFINITY);
  k += first * width;
  v += first * width;
  const auto score = [&](int64_t c) {
    Floats sum{};
    for (int i = 0; i < N; ++i) sum += query[i] * load(k + c * width + i * WIDE);
    ask<N>(k + (c + NEXT) * width);
    ask<N>(v + c * width);
    return sum;
  };
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    const Four four = totals(score(c), score(c + 1), score(c + 2), score(c + 3));
    std::memcpy(weights.data() + c, &four, sizeof four);
  }
  for (; c < count; ++c) weights[c] = total(score(c));
  Floats high = load(weights.data());
  for (int64_t at = WIDE; at < padded; at += WIDE) {
    const Floats other = load(weights.data() + at);
    high = other > high ? other : high;
  }
  float most = high[0];
  for (int64_t i = 1; i < WIDE; ++i) most = std::max(most, high[i]);
  Floats sums{};
  for (int64_t at = 0; at < padded; at += WIDE) {
    const Integers there = lane < static_cast<int32_t>(count - at);
    const Floats e = exponential(load(weights.data() + at) - most);
    const Floats kept = there ? e : Floats{};
    sums += kept;
    store(weights.data() + at, kept);
  }
  Floats out[N];
  for (int i = 0; i < N; ++i) out[i] = Floats{};
  for (int64_t at = 0; at < count; ++at) {
    ask<N>(next + at * width);
    for (int i = 0; i < N; ++i) out[i] += weights[at] * load(v + at * width + i * WIDE);
  }
  const float norm = 1.0f / total(sums);
  for (int i = 0; i < N; ++i) store(y + i * WIDE, out[i] * norm);
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
            query + i * width, key + rows, value + rows, result + i * width, first, last, key + rows + length * width,
            weights);
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
  library.impl("product", &product);
  library.impl("filled_rows", &filled_rows);
}
