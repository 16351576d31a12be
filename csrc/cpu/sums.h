// Sums of lifted elements over blocks, for the norms whose elements are summed. Included by kernels.cpp only, inside
// its instruction set's namespace.
#pragma once

// 16-bit elements go through float lanes, a run of elements at a time. Their squares are exact; a lane takes 16 of
// them in 15 roundings, adding four lanes to one takes 2 more, and all the rest is fp64. So a sum is off by
// 17 * 2^-24 = 1.02e-6 of itself at most, whatever stands beside what, and the norm for p = 2 by half of that.
constexpr int64_t kRun = 16 * kLanes<float>;
constexpr int kRunLanes = 16;

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
  if constexpr (std::is_same_v<N, Two> && (std::is_same_v<T, float> || std::is_same_v<T, Float16>))
    return add_exact_square(acc, x);
  else
    return acc + lifted<N>(x);
}

// What sees the elements beside a sum of them: nothing.
struct Unwatched {
  template <class T>
  void see(const T*) {}
};

// The sum of each lane over each of the blocks at x, for each of the norms.
template <class... Ns, int streams, class T, class Watch>
inline void sum_lanes(const T* x, int64_t n, ArithmeticVector<T> (&acc)[streams][sizeof...(Ns)][kVectors],
                      Watch (&watch)[streams], Pattern pattern) {
  for_lanes<Arithmetic<T>, streams>(x, n, T{}, pattern, [&](int s, const T* lanes) {
    watch[s].see(lanes);
    for (int v = 0; v < kVectors; ++v) {
      const auto elements = load(lanes + v * VectorOf<Arithmetic<T>>::size);
      int k = 0;
      ((acc[s][k][v] = accumulate<Ns, T>(acc[s][k][v], elements), ++k), ...);
    }
  });
}

// acc += the next n elements of each block, a run or less.
template <class... Ns, int streams, class T, int vectors, class Watch>
__attribute__((always_inline)) inline void add_run(const T* x, int64_t n,
                                                   Doubles (&acc)[streams][sizeof...(Ns)][vectors],
                                                   Watch (&watch)[streams], Pattern pattern) {
  Floats runs[streams][sizeof...(Ns)][kVectors] = {};
  sum_lanes<Ns...>(x, n, runs, watch, pattern);
  for (int s = 0; s < streams; ++s)
    for (size_t k = 0; k < sizeof...(Ns); ++k) {
      Floats(&run)[kVectors] = runs[s][k];
      for (int half = kVectors / 2; half * VectorOf<float>::size >= kRunLanes; half /= 2)
        for (int v = 0; v < half; ++v) run[v] += run[v + half];
      for (int v = 0; v < vectors / 2; ++v) {
        acc[s][k][2 * v] += widen_to_double(low_half(run[v]));
        acc[s][k][2 * v + 1] += widen_to_double(high_half(run[v]));
      }
    }
}

// The sums over each of the blocks at x.
template <class... Ns, int streams, class T, class Watch>
__attribute__((always_inline)) inline void block_sums(const T* x, int64_t n, double (&sums)[streams][sizeof...(Ns)],
                                                      Watch (&watch)[streams], Pattern pattern) {
  constexpr int vectors = kDoubleArithmetic<T> ? kVectors : kRunLanes / VectorOf<double>::size;
  Doubles acc[streams][sizeof...(Ns)][vectors] = {};
  if constexpr (kDoubleArithmetic<T>) {
    sum_lanes<Ns...>(x, n, acc, watch, pattern);
  } else {
    int64_t i = 0;
    for (; i + kRun <= n; i += kRun) add_run<Ns...>(x + i, kRun, acc, watch, pattern);
    if (i < n) add_run<Ns...>(x + i, n - i, acc, watch, pattern);
  }
  for (int s = 0; s < streams; ++s)
    for (size_t k = 0; k < sizeof...(Ns); ++k) sums[s][k] = tree_sum(acc[s][k]);
}
