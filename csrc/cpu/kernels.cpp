// The loops of the CPU engine, on one tile. Compiled once per instruction set (see CMakeLists.txt), each time into a
// namespace of its own. All sets keep the same lanes and add in the same order, and FMA contraction is off: they
// return the same bits.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <limits>
#include <type_traits>

namespace fusedclip::cpu::FUSEDCLIP_ISA {
namespace {

#include "power.h"

// 256 bytes of independent accumulators: four 512-bit registers, enough to hide the latency of an addition
// (3-4 cycles at one or two vectors a cycle) behind a load stream that is bound by memory anyway.
template <class A>
constexpr int kLanes = 256 / sizeof(A);
constexpr int kVectors = 256 / kVectorBytes;

// Elements per fp64 sum. A block is still in the first-level cache when it has to be read again.
constexpr int64_t kBlock = 8192;

constexpr size_t kLine = 64, kPage = 4096;

// For the functors of norms.h.
struct Math {
  template <class V>
  static V abs(V v) {
    return magnitude(v);
  }
  static Doubles pow(Doubles magnitude, double p) { return power_of(magnitude, p); }
};

template <class N, class V>
inline V lifted(V x) {
  return N::template lift<Math>(x);
}

template <int n>
using Streams = std::integral_constant<int, n>;

// Calls body(streams, x, count) over x[0..n): so many blocks to be gone through turn about, of `count` elements each.
template <class T, class Body>
inline void for_blocks(T* x, int64_t n, int streams, const Body& body) {
  int64_t i = 0;
  const auto take = [&](auto k) {
    for (; i + k * kBlock <= n; i += k * kBlock) body(k, x + i, kBlock);
  };
  if (streams >= 4) take(Streams<4>{});
  if (streams >= 2) take(Streams<2>{});
  for (; i < n; i += kBlock) body(Streams<1>{}, x + i, n - i < kBlock ? n - i : kBlock);
}

// When the `bytes` at x are reached. Asking for memory that is not there does nothing.
inline void prefetch(const void* x, size_t bytes, int ahead, bool by_page) {
  const char* const there = static_cast<const char*>(x) + ahead;
  if (!by_page)
    for (size_t b = 0; b < bytes; b += kLine) __builtin_prefetch(there + b);
  else if (reinterpret_cast<uintptr_t>(x) % kPage < bytes)
    __builtin_prefetch(there);
}

// Calls body(stream, pointer to kLanes<A> elements) over so many blocks of n elements, the first of which is at x. In a
// single block the last call gets a copy padded with `pad`.
template <class A, int streams, class T, class Body>
inline void for_lanes(const T* x, int64_t n, T pad, Pattern pattern, Body body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>)
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      prefetch(x + s * kBlock + i, kLanes<A> * sizeof(T), pattern.ahead, pattern.by_page);
      body(s, x + s * kBlock + i);
    }
  if (i == n) return;
  T tail[kLanes<A>];
  for (T& t : tail) t = pad;
  __builtin_memcpy(tail, x + i, (n - i) * sizeof(T));
  body(0, static_cast<const T*>(tail));
}

#include "sums.h"

// The largest magnitude of each of the blocks at x, or the least.
template <bool largest, int streams, class T>
inline void extreme_bits(const T* x, int64_t n, Bits<T> (&result)[streams], Pattern pattern) {
  using V = Vector<Bits<T>>;
  const auto beyond = [](auto a, auto b) { return largest ? a > b : a < b; };
  V found[streams][kVectors];
  for (auto& block : found)
    for (V& v : block) v = V{} + (largest ? 0 : kMagnitude<T>);
  for_lanes<Bits<T>, streams>(x, n, largest ? T{} : x[0], pattern, [&](int s, const T* lanes) {
    for (int v = 0; v < kVectors; ++v) {
      const V bits = load_raw<V>(lanes + v * VectorOf<Bits<T>>::size) & kMagnitude<T>;
      found[s][v] = beyond(bits, found[s][v]) ? bits : found[s][v];
    }
  });
  for (int s = 0; s < streams; ++s) {
    result[s] = found[s][0][0];
    for (const V& v : found[s])
      for (int i = 0; i < VectorOf<Bits<T>>::size; ++i) result[s] = beyond(v[i], result[s]) ? v[i] : result[s];
  }
}

// Of all x[0..n).
template <bool largest, class T>
Bits<T> extreme_bits(const T* x, int64_t n, Pattern pattern = {}) {
  Bits<T> result = largest ? 0 : kMagnitude<T>;
  for_blocks(x, n, pattern.streams, [&](auto streams, const T* block, int64_t count) {
    Bits<T> of_block[streams];
    extreme_bits<largest>(block, count, of_block, pattern);
    for (const Bits<T> bits : of_block) result = (largest ? bits > result : bits < result) ? bits : result;
  });
  return result;
}

template <class N, class T>
__attribute__((noinline)) double exact_block_sum(const T* x, int64_t n) {
  // Blocks of zeros are common in embedding gradients: they don't pay for fp64.
  if (extreme_bits<true>(x, n) == 0) return 0;
  constexpr int lanes = 16;
  double acc[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; ++l) acc[l] += lifted<N>(double(widen(x[i + l])));
  for (int l = 0; l < n - i; ++l) acc[l] += lifted<N>(double(widen(x[i + l])));
  double sum = 0;
  for (double a : acc) sum += a;
  return sum;
}

// The sum of a block as it came out, or taken again.
template <class N, class T>
double trusted(double sum, const T* x, int64_t n) {
  if constexpr (kDoubleArithmetic<T> || N::kCounts)
    return sum;
  else
    return is_trusted(sum) ? sum : exact_block_sum<N>(x, n);
}

template <class N, class T>
double sum(const T* x, int64_t n, Pattern pattern) {
  double total = 0;
  for_blocks(x, n, pattern.streams, [&](auto streams, const T* block, int64_t count) {
    double sums[streams][1];
    Unwatched nobody[streams];
    block_sums<N>(block, count, sums, nobody, pattern);
    for (int s = 0; s < streams; ++s) total += trusted<N>(sums[s][0], block + s * kBlock, count);
  });
  return total;
}

#include "stats.h"

// In fp64 all the way: what every dtype but float64 holds is a normal double (float64's subnormals count as 0).
template <class N, class T>
double sum_in_double(const T* x, int64_t n, double p) {
  constexpr int lanes = kLanes<double>;
  double acc[lanes] = {};
  for (int64_t i = 0; i < n; i += lanes) {
    const int count = n - i < lanes ? int(n - i) : lanes;
    double values[lanes];
    for (int l = 0; l < lanes; ++l) {
      const double value = l < count ? double(widen(x[i + l])) : 1;
      values[l] = __builtin_fabs(value) < std::numeric_limits<double>::min() ? 0 : value;
    }
    for (int v = 0; v < kVectors; ++v) {
      double* const vector = values + v * VectorOf<double>::size;
      store(N::template lift<Math>(load(vector), p), vector);
    }
    for (int l = 0; l < count; ++l) acc[l] += values[l];
  }
  return tree_sum(acc);
}

template <class N, class T>
double lift(double p, const T* x, int64_t n, Pattern pattern) {
  if constexpr (N::kInDouble)
    return sum_in_double<N>(x, n, p);
  else if constexpr (N::kCombining == Combining::kSum)
    return sum<N>(x, n, pattern);
  else
    return extreme<T>(N::kCombining, extreme_bits<true>(x, n, pattern),
                      N::kCombining == Combining::kMin ? extreme_bits<false>(x, n, pattern) : 0);
}

#include "rewrite.h"

double lift_any(DType dtype, Norm norm, double p, const void* data, int64_t count, Pattern pattern) {
  return with_dtype(dtype, [=](auto t) {
    const auto* const x = static_cast<const decltype(t)*>(data);
    return with_norm(norm, [=](auto n) { return lift<decltype(n)>(p, x, count, pattern); });
  });
}
Stats stats_any(DType dtype, const void* data, int64_t count, Pattern pattern) {
  return with_dtype(dtype, [=](auto t) { return stats(static_cast<const decltype(t)*>(data), count, pattern); });
}
void scale_any(DType dtype, double coef, void* data, int64_t count, Pattern pattern) {
  return with_dtype(dtype, [=](auto t) { scale(coef, static_cast<decltype(t)*>(data), count, pattern); });
}
bool clamp_any(DType dtype, double bound, void* data, int64_t count, Pattern pattern) {
  return with_dtype(dtype, [=](auto t) { return clamp(bound, static_cast<decltype(t)*>(data), count, pattern); });
}

#define FUSEDCLIP_STRING(x) #x
#define FUSEDCLIP_NAME(x) FUSEDCLIP_STRING(x)

}  // namespace

extern const UpdateKernels update_table;
extern const Kernels table;
const Kernels table = {FUSEDCLIP_NAME(FUSEDCLIP_ISA), lift_any, stats_any, scale_any, clamp_any, &update_table};

}  // namespace fusedclip::cpu::FUSEDCLIP_ISA
