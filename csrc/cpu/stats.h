// Statistics of a tile from one read: the sums as kernels.cpp takes them, and the elements' bits on their way. Zeros
// and what is not finite are counted only in blocks that have any, from the first-level cache. Included by kernels.cpp
// only, inside its instruction set's namespace.
#pragma once

template <class T>
struct Extremes {
  using V = Vector<Bits<T>>;
  V most = {}, least = V{} + kMagnitude<T>;  // magnitudes

  // As many as sum_lanes takes at a time.
  void see(const T* lanes) {
    for (int i = 0; i < kLanes<Arithmetic<T>>; i += VectorOf<Bits<T>>::size) {
      const V bits = load_raw<V>(lanes + i) & kMagnitude<T>;
      most = bits > most ? bits : most;
      least = bits < least ? bits : least;
    }
  }
  Bits<T> largest() const {
    Bits<T> result = 0;
    for (int i = 0; i < VectorOf<Bits<T>>::size; ++i) result = most[i] > result ? most[i] : result;
    return result;
  }
  bool any_zero() const {
    Bits<T> result = kMagnitude<T>;
    for (int i = 0; i < VectorOf<Bits<T>>::size; ++i) result = least[i] < result ? least[i] : result;
    return result == 0;
  }
};

// Elements of a block whose magnitude is below `limit`.
template <class T>
__attribute__((noinline)) int64_t count_below(Bits<T> limit, const T* x, int64_t n) {
  using V = Vector<Bits<T>>;
  constexpr int size = VectorOf<Bits<T>>::size;
  static_assert(kBlock / size <= std::numeric_limits<Bits<T>>::max(), "a lane counts that far");
  V below = {};
  int64_t i = 0;
  for (; i + size <= n; i += size) below -= V((load_raw<V>(x + i) & kMagnitude<T>) < limit);
  int64_t count = 0;
  for (int l = 0; l < size; ++l) count += below[l];
  for (int l = 0; l < n - i; ++l) count += (bit_cast<Bits<T>>(x[i + l]) & kMagnitude<T>) < limit;
  return count;
}

template <class T>
Stats block_stats(const T* x, int64_t n, const double (&sums)[2], const Extremes<T>& extremes) {
  const Bits<T> largest = extremes.largest();
  // A tail is padded with zeros: then this counts, and finds none.
  const int64_t zeros = extremes.any_zero() ? largest == 0 ? n : count_below<T>(1, x, n) : 0;
  const int64_t nonfinite = largest < infinite<T>() ? 0 : n - count_below<T>(infinite<T>(), x, n);
  return {trusted<Two>(sums[0], x, n), trusted<One>(sums[1], x, n), double(zeros), double(nonfinite),
          value_of<T>(largest)};
}

template <class T>
Stats stats(const T* x, int64_t n, Pattern pattern) {
  Stats total{};
  for_blocks(x, n, pattern.streams, [&](auto streams, const T* block, int64_t count) {
    double sums[streams][2];
    Extremes<T> extremes[streams];
    block_sums<Two, One>(block, count, sums, extremes, pattern);
    for (int s = 0; s < streams; ++s)
      total = combine(total, block_stats(block + s * kBlock, count, sums[s], extremes[s]));
  });
  return total;
}
