// The loops that write. Included by kernels.cpp only, inside its instruction set's namespace.
#pragma once

// Applies f to x[0..n) in place, a line of each stream at a time. From the end: what a read pass saw last is still in
// the cache.
template <int streams, class T, class F>
inline void map(T* x, int64_t n, Pattern pattern, F f) {
  constexpr int step = VectorOf<Arithmetic<T>>::size, line = step > int(kLine / sizeof(T)) ? step : kLine / sizeof(T);
  const int64_t each = n / (streams * line) * line;  // elements of a stream
  int64_t i = n / step * step;
  if (i < n) {
    T tail[step] = {};
    __builtin_memcpy(tail, x + i, (n - i) * sizeof(T));
    store(f(load(tail)), tail);
    __builtin_memcpy(x + i, tail, (n - i) * sizeof(T));
  }
  for (; i > streams * each; i -= step) store(f(load(x + i - step)), x + i - step);
  for (i = each - line; i >= 0; i -= line) {
    for (int s = 0; s < streams; ++s) prefetch(x + s * each + i, kLine, -pattern.ahead, pattern.by_page);
    for (int v = 0; v < line; v += step) {
      ArithmeticVector<T> results[streams];  // all loaded before any is stored
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) results[s] = f(load(x + s * each + i + v));
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) store(results[s], x + s * each + i + v);
    }
  }
}

template <class T, class F>
inline void map(T* x, int64_t n, Pattern pattern, F f) {
  if (pattern.streams >= 4) return map<4>(x, n, pattern, f);
  if (pattern.streams >= 2) return map<2>(x, n, pattern, f);
  map<1>(x, n, pattern, f);
}

template <class T>
void scale(double coef, T* x, int64_t n, Pattern pattern) {
  if constexpr (kDoubleArithmetic<T>) {
    map(x, n, pattern, [coef](Doubles v) { return v * coef; });
  } else {
    const auto f = factors_of<float>(coef);
    if (f.power == 1) return map(x, n, pattern, [f](Floats v) { return v * f.rest; });
    map(x, n, pattern, [f](Floats v) { return v * f.rest * f.power; });
  }
}

template <class T>
bool clamp(double bound, T* x, int64_t n, Pattern pattern) {
  const Arithmetic<T> b = rounded_to<T>(bound);
  const ArithmeticVector<T> high = ArithmeticVector<T>{} + b, low = -high;
  bool changed = false;
  for_blocks(x, n, pattern.streams, [&](auto streams, T* block, int64_t count) {
    Bits<T> largest[streams];
    extreme_bits<true>(static_cast<const T*>(block), count, largest, pattern);
    for (int s = 0; s < streams; ++s) {
      if (value_of<T>(largest[s]) <= b) continue;
      map<1>(block + s * kBlock, count, {}, [high, low](ArithmeticVector<T> v) {
        v = v < low ? low : v;
        return v > high ? high : v;
      });
      changed = true;
    }
  });
  return changed;
}
