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

// 16-bit elements go through float lanes, a run of elements at a time. Their squares are exact; a lane takes 16 of
// them in 15 roundings, adding four lanes to one takes 2 more, and all the rest is fp64. So a sum is off by
// 17 * 2^-24 = 1.02e-6 of itself at most, whatever stands beside what, and the norm for p = 2 by half of that.
constexpr int64_t kRun = 16 * kLanes<float>;
constexpr int kRunLanes = 16;

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

// Calls body(pointer to kLanes<A> elements) over x[0..n); the last call gets a copy padded with `pad`.
template <class A, class T, class Body>
inline void for_lanes(const T* x, int64_t n, T pad, Body body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(x + i);
  if (i == n) return;
  T tail[kLanes<A>];
  for (T& t : tail) t = pad;
  __builtin_memcpy(tail, x + i, (n - i) * sizeof(T));
  body(static_cast<const T*>(tail));
}

// Adds lane l and lane l + half, halving: the same tree whatever the vector width.
template <int n>
inline double tree_sum(double (&lanes)[n]) {
#pragma GCC unroll 8
  for (int half = n / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <int vectors>
inline double tree_sum(const Doubles (&acc)[vectors]) {
  double lanes[vectors * VectorOf<double>::size];
  __builtin_memcpy(lanes, acc, sizeof(lanes));
  return tree_sum(lanes);
}

template <class N, class T>
inline ArithmeticVector<T> accumulate(ArithmeticVector<T> acc, ArithmeticVector<T> x) {
  if constexpr (std::is_same_v<N, Two> && std::is_same_v<T, float>)
    return add_exact_square(acc, x);
  else
    return acc + lifted<N>(x);
}

// What sees the elements beside a sum of them: nothing.
struct Unwatched {
  template <class T>
  void see(const T*) {}
};

// The sum of each lane over x[0..n), for each of the norms.
template <class... Ns, class T, class Watch>
inline void sum_lanes(const T* x, int64_t n, ArithmeticVector<T> (&acc)[sizeof...(Ns)][kVectors], Watch& watch) {
  for_lanes<Arithmetic<T>>(x, n, T{}, [&](const T* lanes) {
    watch.see(lanes);
    for (int v = 0; v < kVectors; ++v) {
      const auto elements = load(lanes + v * VectorOf<Arithmetic<T>>::size);
      int k = 0;
      ((acc[k][v] = accumulate<Ns, T>(acc[k][v], elements), ++k), ...);
    }
  });
}

// acc += x[0..n), a run or less.
template <class... Ns, class T, int vectors, class Watch>
__attribute__((always_inline)) inline void add_run(const T* x, int64_t n, Doubles (&acc)[sizeof...(Ns)][vectors],
                                                   Watch& watch) {
  Floats runs[sizeof...(Ns)][kVectors] = {};
  sum_lanes<Ns...>(x, n, runs, watch);
  for (size_t k = 0; k < sizeof...(Ns); ++k) {
    Floats(&run)[kVectors] = runs[k];
    for (int half = kVectors / 2; half * VectorOf<float>::size >= kRunLanes; half /= 2)
      for (int v = 0; v < half; ++v) run[v] += run[v + half];
    for (int v = 0; v < vectors / 2; ++v) {
      acc[k][2 * v] += widen_to_double(low_half(run[v]));
      acc[k][2 * v + 1] += widen_to_double(high_half(run[v]));
    }
  }
}

template <class... Ns, class T, class Watch>
__attribute__((always_inline)) inline void block_sums(const T* x, int64_t n, double (&sums)[sizeof...(Ns)],
                                                      Watch& watch) {
  constexpr int vectors = kDoubleArithmetic<T> ? kVectors : kRunLanes / VectorOf<double>::size;
  Doubles acc[sizeof...(Ns)][vectors] = {};
  if constexpr (kDoubleArithmetic<T>) {
    sum_lanes<Ns...>(x, n, acc, watch);
  } else {
    int64_t i = 0;
    for (; i + kRun <= n; i += kRun) add_run<Ns...>(x + i, kRun, acc, watch);
    if (i < n) add_run<Ns...>(x + i, n - i, acc, watch);
  }
  for (size_t k = 0; k < sizeof...(Ns); ++k) sums[k] = tree_sum(acc[k]);
}

template <class N, class T>
double block_sum(const T* x, int64_t n) {
  double sum[1];
  Unwatched nobody;
  block_sums<N>(x, n, sum, nobody);
  return sum[0];
}

template <class T>
Bits<T> max_bits(const T* x, int64_t n) {
  Vector<Bits<T>> most[kVectors] = {};
  for_lanes<Bits<T>>(x, n, T{}, [&](const T* lanes) {
    for (int v = 0; v < kVectors; ++v) {
      const auto bits = load_raw<Vector<Bits<T>>>(lanes + v * VectorOf<Bits<T>>::size) & kMagnitude<T>;
      most[v] = bits > most[v] ? bits : most[v];
    }
  });
  Bits<T> result = 0;
  for (const auto& vector : most)
    for (int i = 0; i < VectorOf<Bits<T>>::size; ++i) result = vector[i] > result ? vector[i] : result;
  return result;
}

template <class T>
Bits<T> min_bits(const T* x, int64_t n) {
  Vector<Bits<T>> least[kVectors];
  for (auto& v : least) v = Vector<Bits<T>>{} + kMagnitude<T>;
  for_lanes<Bits<T>>(x, n, x[0], [&](const T* lanes) {
    for (int v = 0; v < kVectors; ++v) {
      const auto bits = load_raw<Vector<Bits<T>>>(lanes + v * VectorOf<Bits<T>>::size) & kMagnitude<T>;
      least[v] = bits < least[v] ? bits : least[v];
    }
  });
  Bits<T> result = kMagnitude<T>;
  for (const auto& vector : least)
    for (int i = 0; i < VectorOf<Bits<T>>::size; ++i) result = vector[i] < result ? vector[i] : result;
  return result;
}

template <class N, class T>
double exact_block_sum(const T* x, int64_t n) {
  if (max_bits(x, n) == 0) return 0;  // blocks of zeros are common in embedding gradients: they don't pay for fp64
  constexpr int lanes = 16;
  double acc[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; ++l) acc[l] += lifted<N>(double(widen(x[i + l])));
  for (int l = 0; i < n; ++i, ++l) acc[l] += lifted<N>(double(widen(x[i])));
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
double sum(const T* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    total += trusted<N>(block_sum<N>(x + i, count), x + i, count);
  }
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
double lift(double p, const T* x, int64_t n) {
  if constexpr (N::kInDouble)
    return sum_in_double<N>(x, n, p);
  else if constexpr (N::kCombining == Combining::kSum)
    return sum<N>(x, n);
  else
    return extreme<T>(N::kCombining, max_bits(x, n), N::kCombining == Combining::kMin ? min_bits(x, n) : 0);
}

// Applies f to x[0..n) a vector at a time, in place.
template <class T, class F>
inline void map(T* x, int64_t n, F f) {
  constexpr int step = VectorOf<Arithmetic<T>>::size;
  int64_t i = 0;
  for (; i + step <= n; i += step) store(f(load(x + i)), x + i);
  if (i == n) return;
  T tail[step] = {};
  __builtin_memcpy(tail, x + i, (n - i) * sizeof(T));
  store(f(load(tail)), tail);
  __builtin_memcpy(x + i, tail, (n - i) * sizeof(T));
}

template <class T>
void scale(double coef, T* x, int64_t n) {
  if constexpr (kDoubleArithmetic<T>) {
    map(x, n, [coef](Doubles v) { return v * coef; });
  } else {
    const FloatFactors f = float_factors(coef);
    if (f.power == 1) return map(x, n, [f](Floats v) { return v * f.rest; });
    map(x, n, [f](Floats v) { return v * f.rest * f.power; });
  }
}

template <class T>
bool clamp(double bound, T* x, int64_t n) {
  const Arithmetic<T> b = rounded_to<T>(bound);
  const ArithmeticVector<T> high = ArithmeticVector<T>{} + b, low = -high;
  bool changed = false;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    if (value_of<T>(max_bits(x + i, count)) <= b) continue;
    map(x + i, count, [high, low](ArithmeticVector<T> v) {
      v = v < low ? low : v;
      return v > high ? high : v;
    });
    changed = true;
  }
  return changed;
}

double lift_any(DType dtype, Norm norm, double p, const void* data, int64_t count) {
  return with_dtype(dtype, [=](auto t) {
    const auto* const x = static_cast<const decltype(t)*>(data);
    return with_norm(norm, [=](auto n) { return lift<decltype(n)>(p, x, count); });
  });
}
Stats stats_any(DType dtype, const void* data, int64_t count) {
  return with_dtype(dtype, [=](auto t) { return stats(static_cast<const decltype(t)*>(data), count); });
}
void scale_any(DType dtype, double coef, void* data, int64_t count) {
  return with_dtype(dtype, [=](auto t) { scale(coef, static_cast<decltype(t)*>(data), count); });
}
bool clamp_any(DType dtype, double bound, void* data, int64_t count) {
  return with_dtype(dtype, [=](auto t) { return clamp(bound, static_cast<decltype(t)*>(data), count); });
}

#define FUSEDCLIP_STRING(x) #x
#define FUSEDCLIP_NAME(x) FUSEDCLIP_STRING(x)

}  // namespace

extern const UpdateKernels update_table;
extern const Kernels table;
const Kernels table = {FUSEDCLIP_NAME(FUSEDCLIP_ISA), lift_any, stats_any, scale_any, clamp_any, &update_table};

}  // namespace fusedclip::cpu::FUSEDCLIP_ISA
