// The loop of an update, on a run of elements. Compiled once per instruction set, each time into a namespace of its
// own; all sets return the same bits.
//
// The loop knows one type. Streams that are stored as another pass through a buffer, a block at a time, which stays in
// the first-level cache; so that every mixture of dtypes takes one loop per rule, and fp32 none of this.
#include "update_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <type_traits>

#include "../norm_ops.h"

namespace fusedclip::cpu::FUSEDCLIP_ISA {
namespace {

#include "vectors.h"

constexpr int64_t kBlock = 1024;
template <class A>
using Block = A[kBlock];

// For the functors of updates.h.
struct Math {
  static Floats sqrt(Floats v) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)v);
#else
    return each<Floats>(v, [](float x) { return __builtin_sqrtf(x); });
#endif
  }
  static Doubles sqrt(Doubles v) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
    return (Doubles)_mm256_sqrt_pd((__m256d)v);
#else
    return each<Doubles>(v, [](double x) { return __builtin_sqrt(x); });
#endif
  }
  template <class V>
  static V max(V a, V b) {
    return (a > b) | (a != a) ? a : b;
  }

 private:
  template <class V, class F>
  static V each(V v, F f) {
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(v[i]);
    return v;
  }
};

// Calls body(i, n) over [0, count) with n elements that make a vector; the last may be fewer.
template <int step, class Body>
inline void for_vectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + step <= count; i += step) body(i, std::integral_constant<int, step>{});
  if (i < count) body(i, int(count - i));
}

// A vector of the n elements at `from`; zeros behind them.
template <class V, class T, class N>
inline V take(const T* from, N n) {
  if constexpr (std::is_same_v<N, int>) {
    T padded[sizeof(V) / sizeof(T)] = {};
    __builtin_memcpy(padded, from, n * sizeof(T));
    return load_raw<V>(padded);
  } else {
    return load_raw<V>(from);
  }
}

template <class V, class T, class N>
inline void give(V v, T* to, N n) {
  __builtin_memcpy(to, &v, n * sizeof(T));
}

// --- streams that are stored as another type ---

template <class A, class T>
inline void widen_all(const T* from, int64_t count, A* to) {
  if constexpr (!std::is_same_v<Arithmetic<T>, A>) {
    for (int64_t i = 0; i < count; ++i) to[i] = A(widen(from[i]));
  } else {
    constexpr int step = VectorOf<A>::size;
    for_vectors<step>(count, [&](int64_t i, auto n) {
      T elements[step] = {};
      const T* source = from + i;
      if constexpr (std::is_same_v<decltype(n), int>) {
        __builtin_memcpy(elements, source, n * sizeof(T));
        source = elements;
      }
      give(load(source), to + i, n);
    });
  }
}

template <class A, class T>
inline void narrow_all(const A* from, int64_t count, T* to) {
  if constexpr (!std::is_same_v<Arithmetic<T>, A>) {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(Wide<T>(from[i]));
  } else {
    constexpr int step = VectorOf<A>::size;
    for_vectors<step>(count, [&](int64_t i, auto n) {
      if constexpr (std::is_same_v<decltype(n), int>) {
        T elements[step];
        store(take<Vector<A>>(from + i, n), elements);
        __builtin_memcpy(to + i, elements, n * sizeof(T));
      } else {
        store(load_raw<Vector<A>>(from + i), to + i);
      }
    });
  }
}

inline void join_all(const uint16_t* parameter, const uint16_t* remainder, int64_t count, float* to) {
  for_vectors<VectorOf<float>::size>(count, [&](int64_t i, auto n) {
    const Words high = widen_to_words(take<Halves>(parameter + i, n)),
                low = widen_to_words(take<Halves>(remainder + i, n));
    const Words carry = (high & 0x7fffu) != 0 ? low >> 15 : Words{};
    give((Floats)((high - carry) << 16 | low), to + i, n);
  });
}

inline Halves rounded_away(Floats master) {
  const Words bits = (Words)master;
  return narrow_to_halves(master == master ? (bits + 0x8000u) >> 16 : bits >> 16 | 0x40u);
}

inline void round_all(const float* master, int64_t count, uint16_t* parameter) {
  for_vectors<VectorOf<float>::size>(
      count, [&](int64_t i, auto n) { give(rounded_away(take<Floats>(master + i, n)), parameter + i, n); });
}

inline void remainders(const float* master, int64_t count, uint16_t* to) {
  for_vectors<VectorOf<float>::size>(count, [&](int64_t i, auto n) {
    const Floats v = take<Floats>(master + i, n);
    give(narrow_to_halves(v == v ? (Words)v & 0xffffu : Words{}), to + i, n);
  });
}

template <class T, class P>
inline T* at(P* stream, int64_t first) {
  return static_cast<T*>(stream) + first;
}

template <class A>
constexpr DType kTypeOf = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

// The block's elements as A: where they are, or in the buffer.
template <class A>
inline A* opened(const void* stream, DType type, int64_t first, int64_t count, Block<A>& buffer) {
  if (type == kTypeOf<A>) return const_cast<A*>(at<const A>(stream, first));
  with_dtype(type, [&](auto t) { widen_all<A>(at<const decltype(t)>(stream, first), count, buffer); });
  return buffer;
}

template <class A>
inline void closed(void* stream, DType type, int64_t first, int64_t count, const A* elements) {
  if (type == kTypeOf<A>) return;
  with_dtype(type, [&](auto t) { narrow_all<A>(elements, count, at<decltype(t)>(stream, first)); });
}

// What the rule moves: the parameter, or its master.
template <class A>
inline A* open_value(const UpdateSegment& s, int64_t first, int64_t count, Block<A>& buffer) {
  if constexpr (std::is_same_v<A, float>) {
    if (s.kept == Master::kFloat32) return at<float>(s.master, first);
    if (s.kept == Master::kSplit) {
      join_all(at<const uint16_t>(s.parameter, first), at<const uint16_t>(s.master, first), count, buffer);
      return buffer;
    }
  }
  return opened<A>(s.parameter, s.parameter_type, first, count, buffer);
}

template <class A>
inline void close_value(const UpdateSegment& s, int64_t first, int64_t count, const A* value) {
  if constexpr (std::is_same_v<A, float>) {
    if (s.kept == Master::kSplit) remainders(value, count, at<uint16_t>(s.master, first));
    if (s.kept != Master::kNone && s.parameter_type == DType::kBFloat16)
      return round_all(value, count, at<uint16_t>(s.parameter, first));
  }
  closed(s.parameter, s.parameter_type, first, count, value);
}

// --- the loop ---

template <class A>
struct Factors {
  A rest, power;
};

template <class A>
inline Factors<A> factors_of(double coef, bool negated) {
  if constexpr (std::is_same_v<A, double>) {
    return {negated ? -coef : coef, 1};
  } else {
    const FloatFactors f = float_factors(coef);
    return {negated ? -f.rest : f.rest, f.power};
  }
}

template <class U, class A>
inline void move_all(A* x, const A* g, A* const* states, int64_t count, const typename U::template Constants<A>& c,
                     Factors<A> f) {
  using V = Vector<A>;
  for_vectors<VectorOf<A>::size>(count, [&](int64_t i, auto n) {
    V s[U::kStates + 1];
    for (int k = 0; k < U::kStates; ++k) s[k] = take<V>(states[k] + i, n);
    const V moved = U::template move<Math>(take<V>(x + i, n), V(take<V>(g + i, n) * f.rest * f.power), s, c);
    give(moved, x + i, n);
    for (int k = 0; k < U::kStates; ++k) give(s[k], states[k] + i, n);
  });
}

template <class U, class A>
void update(const UpdateSegment& s, int64_t first, int64_t count, const UpdateRow& row, double step, double coef) {
  const auto constants = U::template constants<A>(row.options, row.lr ? *row.lr : row.options[0], step);
  const Factors<A> factors = factors_of<A>(coef, row.maximize);
  alignas(64) Block<A> buffers[2 + U::kStates];
  for (const int64_t end = first + count; first < end; first += kBlock) {
    const int64_t n = std::min(kBlock, end - first);
    A* const x = open_value<A>(s, first, n, buffers[0]);
    const A* const g = opened<A>(s.gradient, s.gradient_type, first, n, buffers[1]);
    A* states[U::kStates + 1];
    for (int k = 0; k < U::kStates; ++k) states[k] = opened<A>(s.states[k], s.state_types[k], first, n, buffers[2 + k]);
    move_all<U>(x, g, states, n, constants, factors);
    for (int k = 0; k < U::kStates; ++k) closed<A>(s.states[k], s.state_types[k], first, n, states[k]);
    close_value<A>(s, first, n, x);
  }
}

void update_any(Update rule, const UpdateSegment& segment, int64_t first, int64_t count, const UpdateRow& row,
                double step, double coef) {
  with_update(rule, [&](auto u) {
    if (segment.parameter_type == DType::kFloat64)
      update<decltype(u), double>(segment, first, count, row, step, coef);
    else
      update<decltype(u), float>(segment, first, count, row, step, coef);
  });
}

}  // namespace

extern const UpdateKernels update_table;
const UpdateKernels update_table = {update_any};

}  // namespace fusedclip::cpu::FUSEDCLIP_ISA
