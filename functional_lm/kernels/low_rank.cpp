// What low-rank noise adds to a product: y + s (x Aᵀ) B for the rows of each member, in one pass over x and y.
//
// As products of a batch, each member's two thin ones, they take many times what reading x and y does. Here a few rows
// at a time are multiplied with A, and what comes out, R numbers a row, is multiplied with B as y goes by. Sums are in
// float32 and in an order that depends on nothing but the inputs' number: what a member says is the same in any company.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 4, RANKS = 4;  // of a tile: what the registers hold

// How neighbouring numbers are multiplied and added up; `wide` of them at once.
template <typename T>
struct Dot {
  static constexpr int64_t wide = WIDE;
  typedef Floats In;
  static In read(const T* p) { return load(p); }
  static Floats add(const Floats& sum, const In& a, const In& b) { return sum + a * b; }
};

#ifdef __AVX512BF16__

template <>
struct Dot<c10::BFloat16> {
  static constexpr int64_t wide = 2 * WIDE;
  typedef __m512bh In;
  static In read(const c10::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Floats add(const Floats& sum, const In& a, const In& b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};

#endif

// thin[m][r] = scale Σ x[m][i] a[r][i] of M rows and N ranks.
template <int M, int N, typename T>
inline void dots(const T* x, int64_t stride, const T* a, int64_t inputs, float scale, float* thin, int64_t ranks) {
  typedef Dot<T> D;
  Floats sums[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < N; ++r) sums[m][r] = Floats{};
  int64_t i = 0;
  for (; i + D::wide <= inputs; i += D::wide) {
    typename D::In right[N];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) right[r] = D::read(a + r * inputs + i);
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
        sum += static_cast<float>(x[m * stride + rest]) * static_cast<float>(a[r * inputs + rest]);
      thin[m * ranks + r] = scale * sum;
    }
}

// y[m] += Σ thin[m][r] b[r] of M rows.
template <int M, typename T>
inline void widen(T* y, int64_t stride, const float* thin, const T* b, int64_t outputs, int64_t ranks) {
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
      for (int64_t r = 0; r < ranks; ++r) sum += thin[m * ranks + r] * static_cast<float>(b[r * outputs + o]);
      y[m * stride + o] = static_cast<T>(sum);
    }
}

// M rows, whole.
template <int M, typename T>
inline void rows_of(
    const T* x, int64_t x_stride, T* y, int64_t y_stride, const T* a, const T* b, float scale, int64_t inputs,
    int64_t outputs, int64_t ranks, float* thin) {
  int64_t r = 0;
  for (; r + RANKS <= ranks; r += RANKS)
    dots<M, RANKS>(x, x_stride, a + r * inputs, inputs, scale, thin + r, ranks);
  for (; r < ranks; ++r) dots<M, 1>(x, x_stride, a + r * inputs, inputs, scale, thin + r, ranks);
  widen<M>(y, y_stride, thin, b, outputs, ranks);
}

template <typename T>
void low_rank_of(
    const at::Tensor& x, at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale) {
  const int64_t members = x.size(0), rows = x.size(1), inputs = x.size(2), outputs = y.size(2), ranks = a.size(1);
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  const T *left = x.const_data_ptr<T>(), *down = a.const_data_ptr<T>(), *up = b.const_data_ptr<T>();
  const float* by = scale.const_data_ptr<float>();
  T* sums = y.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 65536 / (ROWS * (inputs + outputs) * ranks + 1));
  at::parallel_for(0, members * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> thin(ROWS * ranks);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t p = tile / tiles, at = tile % tiles * ROWS;
      const auto some = [&](auto count, int64_t row) {
        rows_of<decltype(count)::value>(
            left + p * x.stride(0) + row * x.stride(1), x.stride(1), sums + p * y.stride(0) + row * y.stride(1),
            y.stride(1), down + p * a.stride(0), up + p * b.stride(0), by[p * scale.stride(0)], inputs, outputs, ranks,
            thin.data());
      };
      if (at + ROWS <= rows) {
        some(std::integral_constant<int, ROWS>{}, at);
        continue;
      }
      for (int64_t row = at; row < rows; ++row) some(std::integral_constant<int, 1>{}, row);
    }
  });
}

// Rows side by side in memory, whatever lies between one row and the next.
at::Tensor in_rows(const at::Tensor& x) { return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// The same of a factor, whose rows follow each other; members may share one.
at::Tensor without_gaps(const at::Tensor& a) {
  return a.stride(2) == 1 && a.stride(1) == a.size(2) ? a : a.contiguous();
}

// x [P, M, in], y [P, M, out], a [P, R, in], b [P, R, out], scale [P] float32: y becomes y + scale (x aᵀ) b.
void low_rank_(
    const at::Tensor& x, at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale) {
  TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && a.dim() == 3 && b.dim() == 3, "low_rank: members in front");
  TORCH_CHECK(x.size(2) == a.size(2) && y.size(2) == b.size(2) && a.size(1) == b.size(1), "low_rank: factors that fit");
  TORCH_CHECK(y.size(-1) == 1 || y.stride(-1) == 1, "low_rank: rows without gaps");
  TORCH_CHECK(
      x.scalar_type() == y.scalar_type() && a.scalar_type() == y.scalar_type() && b.scalar_type() == y.scalar_type() &&
          scale.scalar_type() == at::kFloat,
      "low_rank: one dtype, and a scale in float32");
  if (y.scalar_type() == at::kBFloat16)
    low_rank_of<c10::BFloat16>(in_rows(x), y, without_gaps(a), without_gaps(b), scale);
  else
    low_rank_of<float>(in_rows(x), y, without_gaps(a), without_gaps(b), scale);
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
