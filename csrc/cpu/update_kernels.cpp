// The loop of an update, on a run of elements. Compiled once per instruction set, each time into a namespace of its
// own; all sets return the same bits.
//
// The mixtures of dtypes that models are trained in have a loop of their own. In all others each stream passes through
// a buffer of the arithmetic's type, a block at a time, which stays in the first-level cache.
#include "update_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <type_traits>

namespace fusedclip::cpu::FUSEDCLIP_ISA {
namespace {

#include "vectors.h"

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

// Calls body(i, n) over [0, count) with n elements that make a vector; the last may be fewer. From the end: of the
// gradients, what a read pass saw last is still in the cache.
template <int step, class Body>
inline void for_vectors(int64_t count, Body body) {
  int64_t i = count / step * step;
  if (i < count) body(i, int(count - i));
  while ((i -= step) >= 0) body(i, std::integral_constant<int, step>{});
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

// --- streams: elements as vectors of the arithmetic's type A, from and to where they are stored ---

// Before what is reached next on the way down: 3 to 6 % of a step on EPYC (Zen 4), where 512 bytes cost as much.
inline void ask_before(const void* x) { __builtin_prefetch(static_cast<const char*>(x) - 256); }

template <class A, class T>
struct Stored {
  T* data;

  template <class N>
  Vector<A> get(int64_t i, N n) const {
    if constexpr (std::is_same_v<T, A>) return take<Vector<A>>(data + i, n);
    T padded[VectorOf<A>::size] = {};
    const T* from = data + i;
    if constexpr (std::is_same_v<N, int>) from = static_cast<T*>(__builtin_memcpy(padded, from, n * sizeof(T)));
    if constexpr (std::is_same_v<Arithmetic<T>, A>) {
      return load(from);
    } else {
      Vector<A> v;
      for (int k = 0; k < VectorOf<A>::size; ++k) v[k] = A(widen(from[k]));
      return v;
    }
  }

  template <class N>
  void put(Vector<A> v, int64_t i, N n) const {
    if constexpr (std::is_same_v<T, A>) return give(v, data + i, n);
    T narrowed[VectorOf<A>::size];
    T* const to = std::is_same_v<N, int> ? narrowed : data + i;
    if constexpr (std::is_same_v<Arithmetic<T>, A>)
      store(v, to);
    else
      for (int k = 0; k < VectorOf<A>::size; ++k) to[k] = narrow<T>(Wide<T>(v[k]));
    if constexpr (std::is_same_v<N, int>) __builtin_memcpy(data + i, narrowed, n * sizeof(T));
  }

  void ask(int64_t i) const { ask_before(data + i); }
};

// As round_away() and remainder_of() have it: a NaN is made one whose lower half is nothing, then all are cut alike.
struct Cut {
  Words bits;

  explicit Cut(Floats master) {
    const Words of_master = (Words)master;
    bits = master == master ? of_master : (of_master | 0x400000u) & 0xffff0000u;
  }
  Halves rounded_away() const { return narrow_to_halves((bits + 0x8000u) >> 16); }
  Halves remainder() const { return narrow_to_halves(bits & 0xffffu); }
};

// A parameter with its master.
template <class T>
struct Kept {
  Stored<float, T> parameter;
  Stored<float, float> master;

  template <class N>
  Floats get(int64_t i, N n) const {
    return master.get(i, n);
  }
  template <class N>
  void put(Floats v, int64_t i, N n) const {
    master.put(v, i, n);
    if constexpr (std::is_same_v<T, BFloat16>)
      give(Cut(v).rounded_away(), parameter.data + i, n);
    else
      parameter.put(v, i, n);
  }
  void ask(int64_t i) const {
    parameter.ask(i);
    master.ask(i);
  }
};

struct Split {
  BFloat16* parameter;
  uint16_t* remainder;

  template <class N>
  Floats get(int64_t i, N n) const {
    const Words high = widen_to_words(take<Halves>(parameter + i, n)),
                low = widen_to_words(take<Halves>(remainder + i, n));
    const Words carry = (high & 0x7fffu) != 0 ? low >> 15 : Words{};
    return (Floats)((high - carry) << 16 | low);
  }
  template <class N>
  void put(Floats v, int64_t i, N n) const {
    const Cut cut(v);
    give(cut.rounded_away(), parameter + i, n);
    give(cut.remainder(), remainder + i, n);
  }
  void ask(int64_t i) const {
    ask_before(parameter + i);
    ask_before(remainder + i);
  }
};

template <class A, class F>
inline void with_stored(const void* data, DType type, int64_t first, F f) {
  with_dtype(type,
             [&](auto t) { f(Stored<A, decltype(t)>{static_cast<decltype(t)*>(const_cast<void*>(data)) + first}); });
}

// f(what the rule moves): the parameter, or its master.
template <class A, class F>
inline void with_value(const UpdateSegment& s, int64_t first, F f) {
  if constexpr (std::is_same_v<A, float>) {
    if (s.kept == Master::kSplit)
      return f(Split{static_cast<BFloat16*>(s.parameter) + first, static_cast<uint16_t*>(s.master) + first});
    if (s.kept == Master::kFloat32)
      return with_stored<A>(s.parameter, s.parameter_type, first, [&](auto parameter) {
        f(Kept<std::remove_pointer_t<decltype(parameter.data)>>{parameter, {static_cast<float*>(s.master) + first}});
      });
  }
  with_stored<A>(s.parameter, s.parameter_type, first, f);
}

// --- the loop ---

template <class U, class A>
struct Mover {
  typename U::template Constants<A> constants;
  Factors<A> factors;

  template <class X, class G, class S>
  void operator()(X value, G gradient, const S* states, int64_t count) const {
    using V = Vector<A>;
    // Copies that no store can reach, which thus stay in registers.
    const auto c = constants;
    const auto f = factors;
    const bool has_power = f.power != 1;  // hardly ever
    S streams[U::kStates + 1];
    for (int k = 0; k < U::kStates; ++k) streams[k] = states[k];
    for_vectors<VectorOf<A>::size>(count, [&](int64_t i, auto n) {
      value.ask(i);
      gradient.ask(i);
      for (int k = 0; k < U::kStates; ++k) streams[k].ask(i);
      V s[U::kStates + 1];
      for (int k = 0; k < U::kStates; ++k) s[k] = streams[k].get(i, n);
      V g = gradient.get(i, n) * f.rest;
      if (__builtin_expect(has_power, false)) g = g * f.power;
      value.put(U::template move<Math>(value.get(i, n), g, s, c), i, n);
      for (int k = 0; k < U::kStates; ++k) streams[k].put(s[k], i, n);
    });
  }
};

template <class A, class From, class To>
inline void copy(From from, To to, int64_t count) {
  for_vectors<VectorOf<A>::size>(count, [&](int64_t i, auto n) { to.put(from.get(i, n), i, n); });
}

// Any mixture, through buffers.
template <class U, class A>
__attribute__((noinline)) void move_any(const Mover<U, A>& move, const UpdateSegment& s, int64_t first, int64_t count) {
  constexpr int64_t kBlock = 1024;
  alignas(64) A buffers[2 + U::kStates][kBlock];
  const Stored<A, A> value{buffers[0]}, gradient{buffers[1]};
  Stored<A, A> states[U::kStates + 1];
  for (int k = 0; k < U::kStates; ++k) states[k] = {buffers[2 + k]};
  for (const int64_t end = first + count; first < end; first += kBlock) {
    const int64_t n = std::min(kBlock, end - first);
    with_value<A>(s, first, [&](auto stored) { copy<A>(stored, value, n); });
    with_stored<A>(s.gradient, s.gradient_type, first, [&](auto stored) { copy<A>(stored, gradient, n); });
    for (int k = 0; k < U::kStates; ++k)
      with_stored<A>(s.states[k], s.state_types[k], first, [&](auto stored) { copy<A>(stored, states[k], n); });
    move(value, gradient, states, n);
    for (int k = 0; k < U::kStates; ++k)
      with_stored<A>(s.states[k], s.state_types[k], first, [&](auto stored) { copy<A>(states[k], stored, n); });
    with_value<A>(s, first, [&](auto stored) { copy<A>(value, stored, n); });
  }
}

template <class T>
constexpr bool kIsSingle = std::is_same_v<T, Stored<float, float>>;
template <class T>
constexpr bool kIsBFloat16 = std::is_same_v<T, Stored<float, BFloat16>>;

// All in fp32, or all in fp64; or bf16 parameters and gradients, with a master or without. Moments in that or in bf16.
template <class A, class X, class G, class S>
constexpr bool kIsCommon =
    std::is_same_v<A, double>
        ? std::is_same_v<X, Stored<A, A>> && std::is_same_v<G, X> && std::is_same_v<S, X>
        : (kIsSingle<S> || kIsBFloat16<S>) &&
              ((kIsSingle<X> && kIsSingle<G>) ||
               (kIsBFloat16<G> && (kIsBFloat16<X> || std::is_same_v<X, Split> || std::is_same_v<X, Kept<BFloat16>>)));

template <class U, class A>
void update(const UpdateSegment& s, int64_t first, int64_t count, const UpdateRow& row, double step, double coef) {
  const Mover<U, A> move{U::template constants<A>(row.options, row.lr ? *row.lr : row.options[0], step),
                         factors_of<A>(row, coef)};
  bool alike = true;
  for (int k = 1; k < U::kStates; ++k) alike &= s.state_types[k] == s.state_types[0];
  if (!alike) return move_any(move, s, first, count);
  with_value<A>(s, first, [&](auto value) {
    using X = decltype(value);  // GCC 12 would not know it of an outer lambda's argument
    with_stored<A>(s.gradient, s.gradient_type, first, [&](auto gradient) {
      using G = decltype(gradient);
      with_stored<A>(s.states[0], U::kStates ? s.state_types[0] : s.gradient_type, first, [&](auto state) {
        using S = decltype(state);
        if constexpr (kIsCommon<A, X, G, S>) {
          S states[U::kStates + 1] = {state};
          for (int k = 1; k < U::kStates; ++k) states[k].data = static_cast<decltype(S::data)>(s.states[k]) + first;
          move(value, gradient, states, count);
        } else {
          move_any(move, s, first, count);
        }
      });
    });
  });
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
