// What low-rank noise adds to a product: y + s (x Aᵀ) Bᵀ for the rows of each member, in one pass over x and y.
//
// As products of a batch, each member's two thin ones, they take many times what reading x and y does. Here a few rows
// at a time are multiplied with A, and what comes out, R numbers a row, is multiplied with B as y goes by. The factors
// are read as they lie, float32 or bfloat16: they are larger than what they are multiplied with is long, so that a copy
// in another order would cost as much again. Sums are in float32 and in an order that depends on nothing but the number
// of inputs: what a member says is the same in any company.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 4, RANKS = 4;  // of a tile: what the registers hold

// How neighbouring numbers of a row (X) and a factor are multiplied and added up; `wide` of them at once.
template <typename X>
struct Dot {
  static constexpr int64_t wide = WIDE;
  typedef Floats In;
  template <typename T>
  static In read(const T* p) {
    return load(p);
  }
  static Floats add(const Floats& sum, const In& a, const In& b) { return sum + a * b; }
};

#ifdef __AVX512BF16__

template <>
struct Dot<c10::BFloat16> {
  static constexpr int64_t wide = 2 * WIDE;
  typedef __m512bh In;
  static In read(const c10::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static In read(const float* p) { return _mm512_cvtne2ps_pbh((__m512)load(p + WIDE), (__m512)load(p)); }
  static Floats add(const Floats& sum, const In& a, const In& b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};

#endif

// A number of a factor beside a row of X: rounded as all of them are.
template <typename X, typename F>
inline float beside(F number) {
  return static_cast<float>(static_cast<X>(static_cast<float>(number)));
}

// thin[m][r] = scale Σ x[m][i] a[r][i] of M rows and N ranks.
template <int M, int N, typename X, typename F>
inline void dots(
    const X* x, int64_t stride, const F* a, int64_t a_stride, int64_t inputs, float scale, float* thin, int64_t ranks) {
  typedef Dot<X> D;
  Floats sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < N; ++r) sums[m][r] = Floats{};
  int64_t i = 0;
  for (; i + D::wide <= inputs; i += D::wide) {
    typename D::In right[N];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) right[r] = D::read(a + r * a_stride + i);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const typename D::In left = D::read(x + m * stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) sums[m][r] = D::add(sums[m][r], left, right[r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < N; ++r) {
      float sum = total(sums[m][r]);
      for (int64_t rest = i; rest < inputs; ++rest)
        sum += static_cast<float>(x[m * stride + rest]) * beside<X>(a[r * a_stride + rest]);
      thin[m * ranks + r] = scale * sum;
    }
}

// y[m] += Σ thin[m][r] b[r] of M rows; b [R, out].
template <int M, typename X>
inline void widen(X* y, int64_t stride, const float* thin, const float* b, int64_t outputs, int64_t ranks) {
  int64_t o = 0;
  for (; o + WIDE <= outputs; o += WIDE) {
    Floats sums[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] = load(y + m * stride + o);
    for (int64_t r = 0; r < ranks; ++r) {
      const Floats right = load(b + r * outputs + o);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m] += thin[m * ranks + r] * right;
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) store(y + m * stride + o, sums[m]);
  }
  for (; o < outputs; ++o)
    for (int m = 0; m < M; ++m) {
      float sum = static_cast<float>(y[m * stride + o]);
      for (int64_t r = 0; r < ranks; ++r) sum += thin[m * ranks + r] * b[r * outputs + o];
      y[m * stride + o] = static_cast<X>(sum);
    }
}

// The factors of one member: B as [R, out] in float32, where it lies so or put so into `room`.
template <typename F>
const float* by_rank(const F* b, int64_t stride, int64_t rank_stride, int64_t outputs, int64_t ranks, float* room) {
  if constexpr (std::is_same_v<F, float>)
    if (stride == 1 && (rank_stride == outputs || ranks == 1)) return b;
  const auto turned = [=](auto count) {  // a number that the compiler knows becomes shuffles of vectors
    constexpr int64_t R = decltype(count)::value;
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t r = 0; r < R; ++r) room[r * outputs + o] = static_cast<float>(b[o * R + r]);
  };
  const bool whole = rank_stride == 1 && stride == ranks;
  if (whole && ranks == 2) return turned(std::integral_constant<int64_t, 2>{}), room;
  if (whole && ranks == 4) return turned(std::integral_constant<int64_t, 4>{}), room;
  if (whole && ranks == 8) return turned(std::integral_constant<int64_t, 8>{}), room;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t r = 0; r < ranks; ++r) room[r * outputs + o] = static_cast<float>(b[o * stride + r * rank_stride]);
  return room;
}

// Ask for what the next member needs before it is needed.
template <typename F>
inline void ask(const F* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(F))) __builtin_prefetch(p + i, 0, 2);
}

template <typename X, typename F>
void low_rank_of(
    const at::Tensor& x, at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale) {
  const int64_t members = x.size(0), rows = x.size(1), inputs = x.size(2), outputs = y.size(2), ranks = a.size(1);
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  const X* left = x.const_data_ptr<X>();
  const F *down = a.const_data_ptr<F>(), *up = b.const_data_ptr<F>();
  const float* by = scale.const_data_ptr<float>();
  X* sums = y.mutable_data_ptr<X>();
  const int64_t grain = std::max<int64_t>(1, 65536 / (ROWS * (inputs + outputs) * ranks + 1));
  at::parallel_for(0, members * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> thin(ROWS * ranks), room(ranks * outputs);
    const float* wide = nullptr;
    for (int64_t tile = begin, last = -1; tile < end; ++tile) {
      const int64_t p = tile / tiles, at = tile % tiles * ROWS;
      if (p != last) wide = by_rank(up + p * b.stride(0), b.stride(1), b.stride(2), outputs, ranks, room.data());
      if (p != last && p + 1 < members) {
        ask(down + (p + 1) * a.stride(0), ranks * inputs);
        ask(up + (p + 1) * b.stride(0), ranks * outputs);
      }
      last = p;
      const F* narrow = down + p * a.stride(0);
      const float factor = by[p * scale.stride(0)];
      const auto some = [&](auto count, int64_t row) {
        constexpr int M = decltype(count)::value;
        const X* from = left + p * x.stride(0) + row * x.stride(1);
        int64_t r = 0;
        for (; r + RANKS <= ranks; r += RANKS)
          dots<M, RANKS>(
              from, x.stride(1), narrow + r * a.stride(1), a.stride(1), inputs, factor, thin.data() + r, ranks);
        for (; r < ranks; ++r)
          dots<M, 1>(from, x.stride(1), narrow + r * a.stride(1), a.stride(1), inputs, factor, thin.data() + r, ranks);
        widen<M>(sums + p * y.stride(0) + row * y.stride(1), y.stride(1), thin.data(), wide, outputs, ranks);
      };
      if (at + ROWS <= rows) {
        some(std::integral_constant<int, ROWS>{}, at);
        continue;
      }
      for (int64_t row = at; row < rows; ++row) some(std::integral_constant<int, 1>{}, row);
    }
  });
}

// Numbers of a row side by side in memory, whatever lies between one row and the next.
at::Tensor in_rows(const at::Tensor& x) { return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// x [P, M, in], y [P, M, out], a [P, R, in], b [P, out, R], scale [P] float32: y becomes y + scale (x aᵀ) bᵀ.
void low_rank_(
    const at::Tensor& x, at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale) {
  TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && a.dim() == 3 && b.dim() == 3, "low_rank: members in front");
  TORCH_CHECK(x.size(2) == a.size(2) && y.size(2) == b.size(1) && a.size(1) == b.size(2), "low_rank: factors that fit");
  TORCH_CHECK(y.size(-1) == 1 || y.stride(-1) == 1, "low_rank: rows without gaps");
  TORCH_CHECK(
      x.scalar_type() == y.scalar_type() && a.scalar_type() == b.scalar_type() && scale.scalar_type() == at::kFloat,
      "low_rank: x as y, a as b, and a scale in float32");
  const bool halves = y.scalar_type() == at::kBFloat16, of_halves = a.scalar_type() == at::kBFloat16;
  const auto run = halves ? (of_halves ? low_rank_of<c10::BFloat16, c10::BFloat16> : low_rank_of<c10::BFloat16, float>)
                          : (of_halves ? low_rank_of<float, c10::BFloat16> : low_rank_of<float, float>);
  run(in_rows(x), y, in_rows(a), b, scale);
}

at::Tensor low_rank(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale) {
  at::Tensor out = y.clone(at::MemoryFormat::Contiguous);
  low_rank_(x, out, a, b, scale);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(functional_lm, CPU, library) {
  library.impl("low_rank", &low_rank);
  library.impl("low_rank_", &low_rank_);
}
